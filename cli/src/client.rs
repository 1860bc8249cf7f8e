//! Talks to the local daemon over its HTTP interface.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use polder_node::daemon::LocalApi;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::failure::{Hint, hinted};

/// Longer than any answer of the daemon takes, except for generated text, which streams.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(120);

/// A connection to the daemon of one home.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    agent: ureq::Agent,
    api: LocalApi,
}

impl Client {
    /// Finds the daemon of `home`.
    ///
    /// # Errors
    ///
    /// That none is running there.
    pub(crate) fn open(home: &Path) -> anyhow::Result<Self> {
        let api = LocalApi::read(home)
            .with_context(|| format!("cannot read {}", LocalApi::path(home).display()))?
            .ok_or_else(|| {
                hinted(
                    anyhow!("no node is running in {}", home.display()),
                    "start it with `polder join`, or name another folder with --home",
                )
            })?;
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // The node is on this machine; a proxy in the environment is for the world outside.
            .proxy(None)
            .timeout_connect(Some(Duration::from_secs(5)))
            .timeout_recv_response(Some(ANSWER_TIME_MAX))
            .build()
            .new_agent();
        Ok(Self { agent, api })
    }

    /// The daemon's process id.
    pub(crate) fn process(&self) -> u32 {
        self.api.process
    }

    /// The address of the daemon's HTTP interface.
    pub(crate) fn address(&self) -> String {
        self.api.address.to_string()
    }

    /// Asks for `path` and reads the JSON answer.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let response = self
            .agent
            .get(self.url(path))
            .header("authorization", self.bearer())
            .call()
            .map_err(|error| self.unreachable(&error))?;
        read(response, path)
    }

    /// Posts `body` as JSON to `path` and reads the JSON answer.
    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        read(self.send(path, body)?, path)
    }

    /// Posts `body` as JSON to `path` and gives the answer's bytes as they come, for streams.
    pub(crate) fn post_stream(&self, path: &str, body: &impl Serialize) -> anyhow::Result<Box<dyn Read + Send>> {
        let response = self.send(path, body)?;
        if response.status().is_success() {
            return Ok(Box::new(response.into_body().into_reader()));
        }
        let error = read::<Value>(response, path).err();
        Err(error.unwrap_or_else(|| anyhow!("{path} failed without a reason")))
    }

    fn send(&self, path: &str, body: &impl Serialize) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
        self.agent
            .post(self.url(path))
            .header("authorization", self.bearer())
            .send_json(body)
            .map_err(|error| self.unreachable(&error))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.api.address)
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.api.token)
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        hinted(
            anyhow!("the node at {} does not answer: {error}", self.api.address),
            "it may have been killed: `polder join` starts it again",
        )
    }
}

/// Reads a JSON answer, or the reason of a failure from its body.
fn read<T: DeserializeOwned>(mut response: ureq::http::Response<ureq::Body>, path: &str) -> anyhow::Result<T> {
    let status = response.status();
    let text = response
        .body_mut()
        .read_to_string()
        .with_context(|| format!("the answer to {path} broke off"))?;
    if status.is_success() {
        return serde_json::from_str(&text)
            .with_context(|| format!("the answer to {path} is not what this program expects"))
            .hint("are program and running node of the same version?");
    }
    let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    let error = answer.get("error").unwrap_or(&Value::Null);
    let reason = error.get("message").unwrap_or(error).as_str().unwrap_or(text.trim());
    let hint = answer.get("hint").or_else(|| error.get("hint")).and_then(Value::as_str);
    match hint {
        Some(hint) => Err(hinted(anyhow!("{reason}"), hint)),
        None if reason.is_empty() => Err(hinted(
            anyhow!("the node answers {status} to {path} and does not say why"),
            "are program and running node of the same version?",
        )),
        None => bail!("{reason}"),
    }
}

/// A name that a person typed, as one segment of a path: whatever it holds, it names nothing else.
pub(crate) fn segment(name: &str) -> String {
    let mut segment = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => segment.push(char::from(byte)),
            // Two dots would be the folder above.
            _ => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_segment_of_a_path() {
        assert_eq!(segment("delta-1"), "delta-1");
        assert_eq!(segment("../a b?"), "%2E%2E%2Fa%20b%3F");
        assert_eq!(segment("é"), "%C3%A9");
    }
}
