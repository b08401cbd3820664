//! From the operator's request to an accepted session.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use sandbox::ThreadKind;

use super::session::{Session, SessionParts};
use crate::Error;
use crate::arbiter::{self, Arbiter, ArbiterError};
use crate::config::FtEnableConfig;
use crate::event::EventSink;
use crate::machine::Protected;
use crate::outbox::{Clock, Outbox, Stamp};
use crate::transport::{Address, Security, Stream};
use crate::wire::frame::{Frame, encode};
use crate::wire::hello::Hello;
use crate::wire::reader::FrameReader;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The backup may need a while to build the shadow.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for the arbiter before anything began.
const ARBITER_TIMEOUT: Duration = Duration::from_secs(10);

/// A name that nobody else has.
pub fn unique_name(kind: &str) -> Result<String, Error> {
    let mut bytes = [0u8; 12];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|source| Error::Host {
            what: "read /dev/urandom",
            source,
        })?;
    Ok(bytes
        .iter()
        .fold(format!("{kind}-"), |name, b| format!("{name}{b:02x}")))
}

/// Calls the arbiter on a thread of its own, because its store may hang.
pub fn ask<T: Send + 'static>(
    arbiter: &Arc<dyn Arbiter>,
    question: impl FnOnce(&dyn Arbiter) -> Result<T, ArbiterError> + Send + 'static,
) -> Result<T, Error> {
    let (answer, answered) = crossbeam_channel::bounded(1);
    let arbiter = arbiter.clone();
    sandbox::spawn(ThreadKind::FtArbiter, "ft-arbiter", move || {
        // Nobody may listen any more.
        let _ = answer.send(question(arbiter.as_ref()));
    })
    .map_err(|source| Error::Host {
        what: "start a thread of FT",
        source,
    })?;
    match answered.recv_timeout(ARBITER_TIMEOUT) {
        Ok(result) => Ok(result?),
        Err(_) => {
            let what = format!("does not answer within {} s", ARBITER_TIMEOUT.as_secs());
            Err(ArbiterError::Store {
                what,
                source: std::io::ErrorKind::TimedOut.into(),
            }
            .into())
        }
    }
}

/// Takes the mark away when the handshake is over.
struct Mark {
    arbiter: Arc<dyn Arbiter>,
    vm_id: String,
    token: String,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.arbiter.unmark(&self.vm_id, &self.token);
    }
}

pub(super) fn connect(
    machine: Arc<dyn Protected>,
    config: FtEnableConfig,
    events: EventSink,
) -> Result<(Arc<Session>, FrameReader<Stream>), Error> {
    config.limits.validate()?;
    let address = Address::parse(&config.peer)?;
    let description = config.arbiter.clone().ok_or(Error::NoArbiter)?;
    let arbiter = arbiter::open(&description)?;
    let identity = machine.identity()?;
    let vm_id = identity.vm_id.clone();
    let id = vm_id.clone();
    let register = ask(&arbiter, move |arbiter| arbiter.read(&id))?;
    let store = ask(&arbiter, |arbiter| arbiter.store_id())?;
    let (node, token) = (unique_name("primary")?, unique_name("mark")?);
    let (id, mark) = (vm_id.clone(), token.clone());
    ask(&arbiter, move |arbiter| arbiter.mark(&id, &mark))?;
    let mark = Mark {
        arbiter: arbiter.clone(),
        vm_id: vm_id.clone(),
        token: token.clone(),
    };

    let security = Security {
        insecure: config.insecure,
        tls: config.tls.as_ref(),
    };
    let stream = address.connect(security, CONNECT_TIMEOUT)?;
    let transport = stream.describe();
    let failed = |reason: String| Error::Handshake {
        peer: config.peer.clone(),
        reason,
    };
    let clock = Clock::default();
    let outbox = Outbox::new(&stream, clock, Stamp::Clock).map_err(|e| failed(e.to_string()))?;
    let generation = register.generation;
    let hello = Hello {
        node: node.clone(),
        identity: identity.clone(),
        generation,
        arbiter: description.clone(),
        store,
        token,
        limits: config.limits.clone(),
        durability: config.durability,
        audit: config.audit,
    };
    let timeouts = stream
        .set_write_timeout(Some(CONNECT_TIMEOUT))
        .and(stream.set_read_timeout(Some(ACCEPT_TIMEOUT)));
    timeouts.map_err(|e| failed(e.to_string()))?;
    outbox
        .write_now(&encode(&Frame::Hello(Box::new(hello))))
        .map_err(|e| failed(e.to_string()))?;
    let mut reader = FrameReader::new(stream);
    let (_, answer) = reader.next(&mut || ()).map_err(|e| failed(e.to_string()))?;
    match answer {
        Frame::Accept(backup) => log::info!("ft: backup {backup} at {} accepted", config.peer),
        Frame::Refuse(refusal) => return Err(refusal.into()),
        other => {
            return Err(failed(
                format!("it answered with {other:?}").chars().take(200).collect(),
            ));
        }
    }
    drop(mark);
    let stream = reader.get_ref();
    let timeouts = stream.set_write_timeout(None).and(stream.set_read_timeout(None));
    timeouts.map_err(|e| failed(e.to_string()))?;
    let parts = SessionParts {
        machine,
        identity,
        arbiter,
        arbiter_description: description,
        node,
        peer: config.peer,
        transport,
        generation,
        durability: config.durability,
        audit: config.audit,
        limits: config.limits,
        outbox,
        clock,
        events,
    };
    Ok((Session::new(parts), reader))
}
