//! What a store holds for a won generation: text that names the winner, with a checksum. The same in every kind of store.

use super::ArbiterError;

/// More than any record has.
pub(super) const MAX_RECORD: u64 = 512;

/// A VM's id, node's name or token, if it can be part of a name in a store.
pub(super) fn check_name(name: &str) -> Result<&str, ArbiterError> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
        return Err(ArbiterError::BadName(name.chars().take(80).collect()));
    }
    Ok(name)
}

/// `node` won `generation` of `vm_id`.
pub(super) fn record(vm_id: &str, generation: u64, node: &str) -> String {
    sealed(format!("vm {vm_id}\ngeneration {generation}\nwinner {node}\n"))
}

/// The winner that a record names; `None`: it is not a record of ours for this generation.
pub(super) fn winner_in(text: &str, vm_id: &str, generation: u64) -> Option<String> {
    let node = text.lines().find_map(|line| line.strip_prefix("winner "))?;
    (check_name(node).is_ok() && text == record(vm_id, generation, node)).then(|| node.to_string())
}

/// The record by which a store is told from others.
pub(super) fn store_record(id: &str) -> String {
    sealed(format!("store {id}\n"))
}

/// The id in such a record.
pub(super) fn store_in(text: &str) -> Option<String> {
    let id = text.lines().next()?.strip_prefix("store ")?;
    (check_name(id).is_ok() && text == store_record(id)).then(|| id.to_string())
}

fn sealed(body: String) -> String {
    let sum = crc32c::crc32c(body.as_bytes());
    format!("{body}crc32c {sum:08x}\n")
}
