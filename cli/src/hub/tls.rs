//! HTTPS through the one rustls of this program: TLS 1.3, aws-lc, the root certificates of browsers or of the machine's
//! owner.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use crate::failure::{Hint as _, hinted};

/// Names a file of root certificates in PEM that are trusted in place of browsers', as OpenSSL, curl and Python have it.
/// That is how a machine behind a proxy that opens connections learns of the proxy's own root.
const ROOTS_VARIABLE: &str = "SSL_CERT_FILE";
/// A machine's whole store has 250 KB.
const ROOTS_BYTES_MAX: u64 = 16 << 20;

/// Wraps connections for `https` addresses.
#[derive(Debug)]
pub(super) struct TlsConnector {
    settings: Arc<ClientConfig>,
}

impl TlsConnector {
    /// Trusts the roots that browsers trust, or those that `SSL_CERT_FILE` names.
    ///
    /// # Errors
    ///
    /// A file of roots that cannot be read, or holds none.
    pub(super) fn from_environment() -> anyhow::Result<Self> {
        let named = std::env::var_os(ROOTS_VARIABLE).filter(|path| !path.is_empty());
        let roots = match named.map(PathBuf::from) {
            Some(path) => roots_of(&path).with_context(|| format!("{ROOTS_VARIABLE} names {}", path.display()))?,
            None => RootCertStore {
                roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
            },
        };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let settings = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            settings: Arc::new(settings),
        })
    }
}

/// Whether a connection failed because of the other side's certificate.
pub(super) fn is_distrust(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    matches!(cause, Some(rustls::Error::InvalidCertificate(_)))
}

fn roots_of(path: &Path) -> anyhow::Result<RootCertStore> {
    let hint = "name a file of certificates in PEM, or unset the variable to trust the roots of browsers";
    let bytes = fs::metadata(path).context("it cannot be read").hint(hint)?.len();
    if bytes > ROOTS_BYTES_MAX {
        return Err(hinted(
            anyhow!("it has {bytes} bytes, which no store of roots has"),
            hint,
        ));
    }
    let text = fs::read(path).context("it cannot be read").hint(hint)?;
    // What else is in the file, such as certificates that are no longer understood, is left out as OpenSSL does.
    let certificates = CertificateDer::pem_slice_iter(&text).filter_map(Result::ok);
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    match added {
        0 => Err(hinted(anyhow!("it holds no root certificate"), hint)),
        _ => Ok(roots),
    }
}

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, TlsTransport>;

    fn connect(&self, details: &ConnectionDetails<'_>, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        let Some(transport) = chained else {
            return Ok(None);
        };
        if !details.needs_tls() || transport.is_tls() {
            return Ok(Some(Either::A(transport)));
        }
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned()).map_err(|_| Error::Tls("the server's name is no name"))?;
        let mut connection = ClientConnection::new(Arc::clone(&self.settings), name).map_err(io::Error::other)?;
        let mut socket = TransportAdapter::new(transport.boxed(), Arc::clone(&details.current_time));
        socket.set_timeout(details.timeout);
        connection.complete_io(&mut socket)?;
        Ok(Some(Either::B(TlsTransport {
            buffers: LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size()),
            stream: StreamOwned::new(connection, socket),
        })))
    }
}

/// An encrypted connection.
pub(super) struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl std::fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsTransport").finish_non_exhaustive()
    }
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.get_mut().set_timeout(timeout);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream.write_all(output)?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.get_mut().set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
