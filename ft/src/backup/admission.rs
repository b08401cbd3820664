//! From a connection to a session, or to a refusal that says what differs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shared;
use super::session::{Session, SessionParts};
use crate::arbiter::{self, Arbiter};
use crate::config::FtInfo;
use crate::heap;
use crate::machine::{Refusal, Shadow};
use crate::outbox::{Clock, Outbox, Stamp};
use crate::primary::session::lock;
use crate::transport::Stream;
use crate::wire::frame::{Frame, encode};
use crate::wire::hello::{Accept, Hello, compare};
use crate::wire::reader::{FrameReader, ReadError};

/// A primary says hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

fn refuse(code: &str, message: impl Into<String>) -> Refusal {
    Refusal {
        code: code.into(),
        message: message.into(),
    }
}

/// Reads the hello of a new connection and serves it, if it is a primary that we take.
pub(super) fn greet(shared: &Arc<Shared>, stream: Stream, peer: &str) {
    let deadline = Instant::now() + HELLO_TIMEOUT;
    let stream = match &shared.tls {
        None => stream,
        Some(tls) => match stream.secure(tls, deadline) {
            Ok(stream) => stream,
            Err(e) => return log::warn!("ft: connection of {peer} dropped: no TLS: {e}"),
        },
    };
    let timeouts = stream
        .set_read_timeout(Some(HELLO_TIMEOUT))
        .and(stream.set_write_timeout(Some(HELLO_TIMEOUT)));
    let clock = Clock::default();
    let outbox = timeouts.and_then(|()| Outbox::new(&stream, clock, Stamp::Echo(0.into())));
    let outbox = match outbox {
        Ok(outbox) => outbox,
        Err(e) => return log::warn!("ft: connection of {peer} dropped: {e}"),
    };
    // Who sends a byte now and then keeps no place here.
    let hang_up = stream.try_clone();
    let mut heard = || {
        if let (Ok(stream), true) = (&hang_up, Instant::now() >= deadline) {
            stream.shutdown();
        }
    };
    let mut reader = FrameReader::new(stream);
    let hello = match reader.next(&mut heard) {
        Ok((_, Frame::Hello(hello))) => *hello,
        Ok((_, other)) => {
            let what: String = format!("{other:?}").chars().take(40).collect();
            return log::warn!("ft: connection of {peer} dropped: it began with {what}, not with hello");
        }
        Err(e) => {
            log::warn!("ft: connection of {peer} dropped: {e}");
            if let ReadError::Decode {
                source: e @ crate::wire::DecodeError::Version(_),
                ..
            } = e
            {
                answer(&outbox, Frame::Refuse(refuse("version_mismatch", e.to_string())));
            }
            return;
        }
    };
    if !shared.claim() {
        let message = "this backup serves another primary already: end that first, or use another VMM";
        answer(&outbox, Frame::Refuse(refuse("backup_busy", message)));
        return log::warn!("ft: {peer} refused: {message}");
    }
    let (reason, over) = serve(shared, hello, outbox, reader, clock, peer);
    shared.leave(reason, over);
    heap::give_back();
}

fn answer(outbox: &Outbox, frame: Frame) {
    if let Err(e) = outbox.write_now(&encode(&frame)) {
        log::warn!("ft: the answer to a primary was not sent: {e}");
    }
}

type End = (Option<String>, Option<FtInfo>);

/// The one place is ours. Returns why the session ended, and the report if that end is final.
fn serve(
    shared: &Arc<Shared>,
    hello: Hello,
    outbox: Outbox,
    reader: FrameReader<Stream>,
    clock: Clock,
    peer: &str,
) -> End {
    let (arbiter, mut shadow) = match admit(shared, &hello) {
        Ok(admitted) => admitted,
        Err(refusal) => {
            log::warn!("ft: {peer} refused: {refusal}");
            let reason = format!("{peer} was refused: {refusal}");
            answer(&outbox, Frame::Refuse(refusal));
            return (Some(reason), None);
        }
    };
    let node = match crate::primary::unique_name("backup") {
        Ok(node) => node,
        Err(e) => {
            shadow.discard(false);
            answer(&outbox, Frame::Refuse(refuse("backup_failed", e.to_string())));
            return (Some(e.to_string()), None);
        }
    };
    // Silence is watched from here on; a read or write may take as long as it takes.
    let stream = reader.get_ref();
    let open = stream.set_read_timeout(None).and(stream.set_write_timeout(None));
    let accept = Frame::Accept(Box::new(Accept {
        node: node.clone(),
        copies: shadow.claims(),
    }));
    if let Err(e) = open.and_then(|()| outbox.write_now(&encode(&accept))) {
        shadow.discard(false);
        return (Some(format!("{peer} hung up: {e}")), None);
    }
    log::info!("ft: {peer} accepted as primary of VM {}", hello.identity.vm_id);
    let session = Session::new(SessionParts {
        arbiter_description: shared.config.arbiter.clone().unwrap_or_else(|| hello.arbiter.clone()),
        hello,
        node,
        peer: peer.to_string(),
        transport: reader.get_ref().describe(),
        arbiter,
        shadow,
        outbox,
        clock,
        events: shared.events.clone(),
    });
    let listed = {
        let mut slot = lock(&shared.slot);
        slot.session = Some(session.clone());
        // Asked to end while we were admitting.
        !shared.quits()
    };
    if !listed {
        session.feed(crate::core::backup::Event::Leave("the backup ends".into()));
    }
    session.serve(reader)
}

fn admit(shared: &Shared, hello: &Hello) -> Result<(Arc<dyn Arbiter>, Box<dyn Shadow>), Refusal> {
    let description = shared.config.arbiter.as_ref().unwrap_or(&hello.arbiter);
    let unusable = |e: arbiter::ArbiterError| refuse(e.code(), format!("the backup's arbiter is not usable: {e}"));
    let arbiter = arbiter::open(description).map_err(unusable)?;
    let vm_id = &hello.identity.vm_id;
    let store = arbiter.store_id().map_err(unusable)?;
    if store != hello.store || !arbiter.sees(vm_id, &hello.token).map_err(unusable)? {
        let message = format!(
            "the backup's arbiter {description} is not the primary's ({}): both must use the same store, or both could \
             run the VM",
            hello.arbiter
        );
        return Err(refuse("arbiter_mismatch", message));
    }
    let generation = arbiter.read(vm_id).map_err(unusable)?.generation;
    if generation != hello.generation {
        let message = format!(
            "the arbiter's generation is {generation}, the primary's is {}",
            hello.generation
        );
        return Err(refuse("generation_mismatch", message));
    }
    let shadow = shared.host.create_shadow(&hello.identity)?;
    if let Err(refusal) = compare(&hello.identity, &shadow.identity()) {
        shadow.discard(false);
        return Err(refusal);
    }
    Ok((arbiter, shadow))
}
