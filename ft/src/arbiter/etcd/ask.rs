//! One question to a cluster: which member is asked when, and when to give up.
//!
//! The members are asked one after the other, each a little later than the one before or as soon as that one failed; the
//! first answer counts. So a member that is gone or cut off from the others costs [`HEAD_START`]. Every question may be
//! answered more than once, by several members or after it was given up: all are made so that this does no harm.

use std::error::Error as _;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::super::ArbiterError;
use super::super::description::{EtcdCluster, TlsFiles};

/// So much earlier than the next member is one asked.
const HEAD_START: Duration = Duration::from_millis(200);

/// What a member did not answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// It is not there, or cannot say now: another one may.
    Unanswered(String),
    /// It answered, and what it has is not right.
    Wrong(ArbiterError),
}

impl From<ArbiterError> for Failure {
    fn from(error: ArbiterError) -> Self {
        Self::Wrong(error)
    }
}

impl From<etcd_client::Error> for Failure {
    fn from(error: etcd_client::Error) -> Self {
        let (mut text, mut source) = match &error {
            etcd_client::Error::GRpcStatus(status) => (status.message().to_string(), status.source()),
            etcd_client::Error::TransportError(e) => (e.to_string(), e.source()),
            other => (other.to_string(), None),
        };
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.contains(&cause_text) {
                text = format!("{text}: {cause_text}");
            }
            source = cause.source();
        }
        Self::Unanswered(text)
    }
}

/// The members of a cluster, and how to talk to them.
pub(super) struct Members {
    endpoints: Vec<String>,
    tls: Option<TlsFiles>,
    /// The one to ask first: it answered the last time.
    first: AtomicUsize,
}

impl Members {
    pub fn new(cluster: &EtcdCluster) -> Self {
        Self {
            endpoints: cluster.endpoints.clone(),
            tls: cluster.tls.clone(),
            first: AtomicUsize::new(0),
        }
    }

    /// For errors.
    pub fn place(&self) -> String {
        format!("etcd {}", self.endpoints.join("+"))
    }

    /// How to connect. The files are read each time, because certificates are renewed.
    pub fn options(&self) -> Result<ConnectOptions, ArbiterError> {
        let options = ConnectOptions::new().with_require_leader(true);
        let Some(files) = &self.tls else { return Ok(options) };
        let read = |path: &std::path::Path| {
            std::fs::read(path).map_err(|source| ArbiterError::Store {
                what: format!("file {}", path.display()),
                source,
            })
        };
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&files.ca)?));
        if let Some((cert, key)) = &files.identity {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(options.with_tls(tls))
    }

    /// Puts `question` to the members until one answers or `bound` has passed. Blocks.
    pub fn ask<T, F>(&self, bound: Duration, question: impl Fn(Client) -> F) -> Result<T, ArbiterError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let failed = |source| ArbiterError::Store {
            what: self.place(),
            source,
        };
        let options = self.options()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let mut failures = Vec::new();
        let answer = runtime.block_on(async { timeout(bound, self.race(options, question, &mut failures)).await });
        // A name that is still being looked up would hold up the ordinary way.
        runtime.shutdown_background();
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Some(wrong))) => Err(wrong),
            Ok(Err(None)) => Err(failed(io::Error::other(failures.join("; ")))),
            Err(_) => {
                let mut text = format!("no answer within {} s", bound.as_secs());
                if !failures.is_empty() {
                    text = format!("{text} ({})", failures.join("; "));
                }
                Err(failed(io::Error::new(io::ErrorKind::TimedOut, text)))
            }
        }
    }

    /// `Err(None)`: none of them can say.
    async fn race<T, F>(
        &self,
        options: ConnectOptions,
        question: impl Fn(Client) -> F,
        failures: &mut Vec<String>,
    ) -> Result<T, Option<ArbiterError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let count = self.endpoints.len();
        let first = self.first.load(Ordering::Relaxed);
        let mut rest = (0..count).map(|n| (first + n) % count);
        let mut asked = JoinSet::new();
        loop {
            if let Some(index) = rest.next() {
                let url = format!("{scheme}://{}", self.endpoints[index]);
                // Connects at the first request.
                match Client::connect([url], Some(options.clone())).await {
                    Ok(client) => {
                        let answer = question(client);
                        asked.spawn(async move { (index, answer.await) });
                    }
                    Err(e) => failures.push(self.failure(index, e.into())?),
                }
            } else if asked.is_empty() {
                return Err(None);
            }
            let answered = match rest.len() {
                0 => asked.join_next().await,
                _ => match timeout(HEAD_START, asked.join_next()).await {
                    Ok(answered) => answered,
                    Err(_) => continue,
                },
            };
            match answered {
                Some(Ok((index, Ok(answer)))) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Some(Ok((index, Err(failure)))) => failures.push(self.failure(index, failure)?),
                Some(Err(e)) => failures.push(e.to_string()),
                None => {}
            }
        }
    }

    fn failure(&self, index: usize, failure: Failure) -> Result<String, Option<ArbiterError>> {
        match failure {
            Failure::Unanswered(reason) => Ok(format!("{}: {reason}", self.endpoints[index])),
            Failure::Wrong(error) => Err(Some(error)),
        }
    }
}
