//! The hub's HTTP interface: listings, facts of files, and their bytes.

use std::fmt;
use std::io::Read;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde::Deserialize;
use ureq::http::Response;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectProxyConnector, Connector as _, TcpConnector};
use ureq::{Agent, Body};

use super::Place;
use super::place::is_path;
use super::tls::TlsConnector;
use crate::failure::{Hint, hinted};

const ENDPOINT: &str = "https://huggingface.co";
/// A listing of the largest repositories, some ten thousand files.
const LISTING_BYTES_MAX: u64 = 32 << 20;
/// Attempts at a question that the hub is too busy for; then it is down.
const ATTEMPTS_MAX: u32 = 5;
/// Before the second attempt; doubled before each further one.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest pause that a hub may ask for.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// From a renamed repository to its new name, and on to where its files lie; more is a circle.
const MOVES_MAX: usize = 5;

/// A hub, and the right to read from it.
pub(crate) struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token is a secret.
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// The files of a repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    /// What the revision stands for now.
    pub(crate) commit: String,
    /// Paths within the repository.
    pub(crate) files: Vec<String>,
}

/// What the hub says of a file before it sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Its path within the repository.
    pub(crate) file: String,
    /// Its length.
    pub(crate) bytes: u64,
    /// The hash of its content.
    pub(crate) hash: FileHash,
}

/// How the hub names a file's content, in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FileHash {
    /// SHA-256 of a large file.
    Sha256(String),
    /// git's name of a small file: SHA-1 of its length and content.
    GitBlob(String),
}

impl Hub {
    /// The hub that `HF_ENDPOINT` names, else Hugging Face's; `HF_TOKEN` opens private and gated models.
    pub(crate) fn from_environment() -> anyhow::Result<Self> {
        let read = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned());
        let endpoint = read("HF_ENDPOINT").filter(|endpoint| !endpoint.is_empty());
        let token = read("HF_TOKEN").filter(|token| !token.is_empty());
        Self::new(&endpoint.unwrap_or_else(|| ENDPOINT.to_owned()), token)
    }

    fn new(endpoint: &str, token: Option<String>) -> anyhow::Result<Self> {
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            bail!("HF_ENDPOINT is `{endpoint}`, which is no http or https address");
        }
        if token
            .as_ref()
            .is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            bail!("HF_TOKEN holds letters that no token has");
        }
        let settings = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("polder/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A connection on which nothing comes for so long is given up, and the download goes on over another.
            .timeout_per_read(Some(Duration::from_secs(30)))
            .build();
        let connector =
            ().chain(ConnectProxyConnector::default())
                .chain(TcpConnector::default())
                .chain(TlsConnector::from_environment()?);
        Ok(Self {
            agent: Agent::with_parts(settings, connector, DefaultResolver::default()),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
        })
    }

    /// What a repository holds at the place's revision.
    pub(crate) fn list(&self, place: &Place) -> anyhow::Result<Listing> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let (organisation, name) = (&place.organisation, &place.name);
        let revision = place.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{organisation}/{name}/revision/{revision}", self.endpoint);
        let response = patiently(|| self.get(url.clone(), 0)).map_err(|error| self.unreachable(&error))?;
        let mut response = self.accepted(response, place)?;
        let text = response
            .body_mut()
            .with_config()
            .limit(LISTING_BYTES_MAX)
            .read_to_string()
            .context("the listing broke off")
            .hint("run the same command again")?;
        let answer: Answer = serde_json::from_str(&text)
            .with_context(|| format!("the answer of {} is no listing", self.endpoint))
            .hint("does HF_ENDPOINT name a hub?")?;
        if answer.sha.is_empty() || answer.sha.len() > 64 || !answer.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            bail!("the answer of {} names no commit", self.endpoint);
        }
        let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename);
        Ok(Listing {
            commit: answer.sha,
            // Files with odd names are none that a model needs.
            files: files.filter(|file| is_path(file)).collect(),
        })
    }

    /// Length and hash of a file.
    pub(crate) fn facts(&self, place: &Place, commit: &str, file: &str) -> anyhow::Result<Facts> {
        let mut url = self.file_url(place, commit, file);
        for _ in 0..MOVES_MAX {
            let response = patiently(|| {
                let mut request = self.agent.head(&url);
                if let Some(bearer) = self.bearer_for(&url) {
                    request = request.header("authorization", bearer);
                }
                request.call()
            });
            let response = response.map_err(|error| self.unreachable(&error))?;
            let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
            if response.status().is_redirection() && header("x-linked-etag").is_none() {
                // A renamed repository. Only where large files lie has another host, and those name their hash here.
                let target = header("location").unwrap_or_default();
                url = match target.strip_prefix(&self.endpoint).unwrap_or(&target) {
                    path if path.starts_with('/') && !path.starts_with("//") => format!("{}{path}", self.endpoint),
                    _ => bail!("the hub sends `{file}` from elsewhere and names no hash for it"),
                };
                continue;
            }
            let header = |name: &str| header(name).map(|value| value.trim().to_owned());
            let hash = header("x-linked-etag").or_else(|| header("etag"));
            let bytes = header("x-linked-size").or_else(|| header("content-length"));
            if !response.status().is_redirection() {
                self.accepted(response, place)
                    .with_context(|| format!("cannot fetch {file}"))?;
            }
            let hash = hash.as_deref().and_then(FileHash::of_tag);
            let bytes = bytes.and_then(|bytes| bytes.parse().ok());
            let (Some(hash), Some(bytes)) = (hash, bytes) else {
                bail!("the hub names no length and hash for `{file}`, so it could not be checked");
            };
            return Ok(Facts {
                file: file.to_owned(),
                bytes,
                hash,
            });
        }
        bail!("the hub sends `{file}` in a circle")
    }

    /// A file's bytes from `start` on.
    pub(super) fn bytes(&self, place: &Place, commit: &str, file: &str, start: u64) -> Result<Bytes, Refusal> {
        let response = self.get(self.file_url(place, commit, file), start);
        let response = response.map_err(|error| Refusal::Broken(error.to_string()))?;
        let status = response.status().as_u16();
        let from = match status {
            200 => 0,
            206 => {
                let range = response
                    .headers()
                    .get("content-range")
                    .and_then(|range| range.to_str().ok());
                let from = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok());
                from.ok_or_else(|| Refusal::Broken("a part of the file came without saying which".to_owned()))?
            }
            416 => return Err(Refusal::Beyond),
            429 | 500..=599 => return Err(Refusal::Broken(format!("the hub answers {status}"))),
            _ => {
                let error = self.accepted(response, place).err();
                return Err(Refusal::Final(
                    error.unwrap_or_else(|| anyhow!("the hub answers {status}")),
                ));
            }
        };
        Ok(Bytes {
            from,
            reader: Box::new(response.into_body().into_reader()),
        })
    }

    fn file_url(&self, place: &Place, commit: &str, file: &str) -> String {
        let (organisation, name) = (&place.organisation, &place.name);
        let file = file.replace('+', "%2B");
        format!("{}/{organisation}/{name}/resolve/{commit}/{file}", self.endpoint)
    }

    /// Asks for an address, of its bytes from `start` on, and follows where it sends us.
    fn get(&self, mut url: String, start: u64) -> Result<Response<Body>, ureq::Error> {
        for _ in 0..MOVES_MAX {
            let mut request = self.agent.get(&url);
            if let Some(bearer) = self.bearer_for(&url) {
                request = request.header("authorization", bearer);
            }
            if start > 0 {
                request = request.header("range", format!("bytes={start}-"));
            }
            let response = request.call()?;
            let target = response
                .headers()
                .get("location")
                .and_then(|target| target.to_str().ok());
            let Some(target) = target.filter(|_| response.status().is_redirection()) else {
                return Ok(response);
            };
            // The first slash after `https://` ends an origin.
            let end = url.match_indices('/').nth(2).map_or(url.len(), |(at, _)| at);
            url = match target {
                path if path.starts_with('/') && !path.starts_with("//") => {
                    format!("{}{path}", url.get(..end).unwrap_or_default())
                }
                whole if whole.starts_with("https://") => whole.to_owned(),
                plain if plain.starts_with("http://") && url.starts_with("http://") => plain.to_owned(),
                _ => return Err(ureq::Error::RedirectFailed),
            };
        }
        Err(ureq::Error::TooManyRedirects)
    }

    /// The token, for the hub's own addresses and nobody else's.
    fn bearer_for(&self, url: &str) -> Option<String> {
        let is_own = url
            .strip_prefix(&self.endpoint)
            .is_some_and(|path| path.starts_with('/'));
        let token = self.token.as_ref().filter(|_| is_own)?;
        Some(format!("Bearer {token}"))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        let distrusted = matches!(error, ureq::Error::Io(error) if super::tls::is_distrust(error));
        hinted(
            anyhow!("{} does not answer: {error}", self.endpoint),
            match distrusted {
                true => {
                    "no root that is trusted here vouches for its certificate; behind a proxy that opens connections, set \
                     SSL_CERT_FILE to a PEM file with the proxy's root"
                }
                false => "is this machine online? HF_ENDPOINT may name another hub or a mirror",
            },
        )
    }

    /// A success, or what its status means and what to try.
    fn accepted(&self, response: Response<Body>, place: &Place) -> anyhow::Result<Response<Body>> {
        let model = format!("{}/{}", place.organisation, place.name);
        let endpoint = &self.endpoint;
        let status = response.status();
        match status.as_u16() {
            _ if status.is_success() => Ok(response),
            401 | 403 => Err(hinted(
                anyhow!("{endpoint} does not let us read `{model}` ({status})"),
                match self.token {
                    None => format!(
                        "there may be no such model; if it is private or gated, agree to its terms at \
                         {endpoint}/{model} and set HF_TOKEN to a token that may read it"
                    ),
                    Some(_) => format!("may the token in HF_TOKEN read it? Its terms are at {endpoint}/{model}"),
                },
            )),
            404 => Err(hinted(
                anyhow!(
                    "{endpoint} has no `{model}` at `{}` with that file ({status})",
                    place.revision
                ),
                "check the spelling of organisation, name, revision and file",
            )),
            _ => Err(hinted(anyhow!("{endpoint} answers {status}"), "try again later")),
        }
    }
}

/// Asks again, with pauses, while the hub says that it cannot answer now.
fn patiently(ask: impl Fn() -> Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, ureq::Error> {
    let mut pause = PAUSE;
    for _ in 1..ATTEMPTS_MAX {
        let response = ask()?;
        if !matches!(response.status().as_u16(), 429 | 500..=599) {
            return Ok(response);
        }
        let wanted = response.headers().get("retry-after");
        let wanted = wanted.and_then(|seconds| seconds.to_str().ok()?.trim().parse().ok());
        thread::sleep(wanted.map_or(pause, Duration::from_secs).min(PAUSE_MAX));
        pause *= 2;
    }
    ask()
}

/// A file on its way.
pub(super) struct Bytes {
    /// Where in the file it begins.
    pub(super) from: u64,
    pub(super) reader: Box<dyn Read>,
}

/// Why no bytes come.
pub(super) enum Refusal {
    /// Worth another attempt.
    Broken(String),
    /// The file is not as long as what is here already.
    Beyond,
    /// Nothing to be done by asking again.
    Final(anyhow::Error),
}

impl FileHash {
    /// Reads an ETag: 64 digits of SHA-256 or 40 of SHA-1.
    fn of_tag(tag: &str) -> Option<Self> {
        let digits = tag
            .strip_prefix("W/")
            .unwrap_or(tag)
            .trim_matches('"')
            .to_ascii_lowercase();
        let hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        match digits.len() {
            64 if hexadecimal => Some(Self::Sha256(digits)),
            40 if hexadecimal => Some(Self::GitBlob(digits)),
            _ => None,
        }
    }
}
