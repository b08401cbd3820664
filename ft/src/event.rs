//! Events for the VMM's event monitor: one for each change of FT's state.

use std::sync::Arc;

use crate::config::{FtRole, FtState};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FtEvent {
    /// What happened, for example `protected`.
    pub event: &'static str,
    /// Details: state, role, generation, epoch, committed, reason.
    pub properties: Vec<(String, String)>,
}

/// Gets FT's events; must not block and must not call back into FT.
pub type EventSink = Arc<dyn Fn(FtEvent) + Send + Sync>;

/// What an event tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// State of this side.
    pub state: FtState,
    /// Why, if there is something to say.
    pub reason: Option<String>,
    /// Generation that this side last knew to be won.
    pub generation: u64,
    /// Running epoch (backup: epoch being received).
    pub epoch: u64,
    /// Last committed epoch.
    pub committed: u64,
}

/// Logs a change of state and tells the sink.
pub(crate) fn announce(sink: &EventSink, role: FtRole, status: &Status) {
    let (state, role) = (status.state.name(), role.name());
    let reason = status.reason.as_deref().unwrap_or("");
    let level = match status.state {
        FtState::Failed | FtState::Stopped | FtState::WaitingForArbiter => log::Level::Warn,
        _ => log::Level::Info,
    };
    log::log!(
        level,
        "ft: {role} is {state}: generation {}, epoch {}, committed {}{}{reason}",
        status.generation,
        status.epoch,
        status.committed,
        if reason.is_empty() { "" } else { ": " }
    );
    let mut properties = vec![
        ("state".to_string(), state.to_string()),
        ("role".to_string(), role.to_string()),
        ("generation".to_string(), status.generation.to_string()),
        ("epoch".to_string(), status.epoch.to_string()),
        ("committed".to_string(), status.committed.to_string()),
    ];
    if !reason.is_empty() {
        properties.push(("reason".to_string(), reason.to_string()));
    }
    sink(FtEvent {
        event: state,
        properties,
    });
}

/// Why, and what else there is to say.
pub(crate) fn joined(reason: Option<String>, more: Option<String>) -> Option<String> {
    match (reason, more) {
        (Some(reason), Some(more)) => Some(format!("{reason}; {more}")),
        (reason, more) => reason.or(more),
    }
}
