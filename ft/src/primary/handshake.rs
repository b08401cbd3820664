//! From the operator's request to a backup that has accepted.
//!
//! Nothing of the VM is needed here but its identity: until [`Offer::begin`] it is untouched, and may even end meanwhile.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sandbox::ThreadKind;

use super::Primary;
use super::session::{Session, SessionParts, lock};
use crate::Error;
use crate::arbiter::{self, Arbiter, ArbiterError};
use crate::config::FtEnableConfig;
use crate::event::EventSink;
use crate::machine::{Identity, Protected};
use crate::outbox::{Clock, Outbox, Stamp};
use crate::reprotect::Reprotect;
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

/// Ends a handshake from another thread, where that waits for the backup.
#[derive(Default)]
pub struct Cancel(Mutex<(bool, Option<Stream>)>);

impl Cancel {
    /// The handshake ends with an error, now or as soon as it has a connection.
    pub fn cancel(&self) {
        let mut state = lock(&self.0);
        state.0 = true;
        if let Some(stream) = state.1.take() {
            stream.shutdown();
        }
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        lock(&self.0).0
    }

    fn watch(&self, stream: &Stream) -> std::io::Result<()> {
        let stream = stream.try_clone()?;
        let mut state = lock(&self.0);
        if state.0 {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        state.1 = Some(stream);
        Ok(())
    }

    /// The connection is not its business any more.
    fn release(&self) {
        lock(&self.0).1 = None;
    }
}

/// A backup that has accepted. Without [`Offer::begin`] it is let go again.
pub struct Offer {
    parts: SessionParts,
    reader: FrameReader<Stream>,
}

impl Offer {
    /// Begins to protect the VM, which `machine` is: pre-copy, then epochs.
    pub fn begin(self, machine: Arc<dyn Protected>) -> Result<Primary, Error> {
        Primary::start(Session::new(machine, self.parts), self.reader)
    }
}

/// Asks the backup at `config.peer` to take the VM of this identity.
pub fn offer(identity: Identity, config: FtEnableConfig, events: EventSink, cancel: &Cancel) -> Result<Offer, Error> {
    let offered = shake_hands(identity, config, events, cancel);
    cancel.release();
    offered
}

fn shake_hands(identity: Identity, config: FtEnableConfig, events: EventSink, cancel: &Cancel) -> Result<Offer, Error> {
    config.limits.validate()?;
    let reprotect = Reprotect::new(&config)?;
    let address = Address::parse(&config.peer)?;
    let description = config.arbiter.clone().ok_or(Error::NoArbiter)?;
    let arbiter = arbiter::open(&description)?;
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
    cancel.watch(&stream).map_err(|e| failed(e.to_string()))?;
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
        reprotect: reprotect.clone(),
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
    let copies = match answer {
        Frame::Accept(accept) => {
            log::info!("ft: backup {} at {} accepted", accept.node, config.peer);
            accept.copies
        }
        Frame::Refuse(refusal) => return Err(refusal.into()),
        other => {
            return Err(failed(
                format!("it answered with {other:?}").chars().take(200).collect(),
            ));
        }
    };
    drop(mark);
    let stream = reader.get_ref();
    let timeouts = stream.set_write_timeout(None).and(stream.set_read_timeout(None));
    timeouts.map_err(|e| failed(e.to_string()))?;
    let parts = SessionParts {
        identity,
        arbiter,
        arbiter_description: description,
        node,
        peer: config.peer,
        transport,
        generation,
        durability: config.durability,
        copies,
        audit: config.audit,
        limits: config.limits,
        outbox,
        clock,
        events,
        reprotect,
    };
    Ok(Offer { parts, reader })
}
