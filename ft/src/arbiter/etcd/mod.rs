//! The arbiter in an etcd cluster.
//!
//! `PREFIX/ID/gen/N` holds the winner of VM ID's generation N. It is made by a transaction that succeeds only if nothing
//! is there yet from N on, generation N - 1 is there, and both the store and the newest generation that this arbiter saw
//! are what they were. Such a key is never changed or removed: a late contender must still find out that it lost, and
//! a node whose answer was lost that it won. `PREFIX/store` holds a random id; `PREFIX/ID/mark/TOKEN` is a mark, with a
//! lease.
//!
//! A cluster that was put back to an earlier state is found out by what the transaction compares, by the cluster's id
//! (another one after `etcdctl snapshot restore` with a new token) and by the revision, which must not shrink.

mod ask;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, GetResponse, PutOptions, ResponseHeader, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse,
};

use super::description::EtcdCluster;
use super::memory::{Memory, corrupt, went_back};
use super::record::{check_name, record, store_in, store_record, winner_in};
use super::{Arbiter, ArbiterError, Register, Verdict};
use ask::{Failure, Members};

/// Longest wait for an answer.
const BOUND: Duration = Duration::from_secs(5);

/// Longest wait for a mark to be taken away; its lease ends it otherwise.
const UNMARK_BOUND: Duration = Duration::from_secs(1);

/// A mark's life in seconds: longer than any handshake.
const MARK_TTL: i64 = 300;

/// Test-and-set by an etcd transaction.
pub struct EtcdArbiter {
    members: Members,
    store: Arc<Store>,
}

impl EtcdArbiter {
    /// Reads the TLS files, but asks nobody yet.
    pub fn open(cluster: EtcdCluster) -> Result<Self, ArbiterError> {
        let members = Members::new(&cluster);
        members.options()?;
        let local = |endpoint: &String| ["127.", "localhost:", "[::1]:"].iter().any(|l| endpoint.starts_with(l));
        if cluster.tls.is_none() && !cluster.endpoints.iter().all(local) {
            log::warn!("ft: the arbiter is reached without TLS: who can write to that network decides who runs the VM");
        }
        let store = Arc::new(Store {
            place: members.place(),
            prefix: cluster.prefix,
            memory: Memory::default(),
            revision: AtomicI64::new(0),
        });
        Ok(Self { members, store })
    }

    /// Asks `question` of a store that was found to be ours.
    fn ask<T, F>(
        &self,
        bound: Duration,
        question: impl Fn(Client, Arc<Store>, Met) -> F + Clone + Send + 'static,
    ) -> Result<T, ArbiterError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        // Before the question: answers that overtake one another are no step back.
        let floor = self.store.revision.load(Ordering::SeqCst);
        self.members.ask(bound, |mut client| {
            let (store, question) = (self.store.clone(), question.clone());
            async move {
                let met = store.meet(&mut client, floor).await?;
                question(client, store, met).await
            }
        })
    }
}

/// The store, found to be ours.
struct Met {
    /// Cluster and place in it.
    id: String,
    /// What its key holds.
    record: String,
    cluster: u64,
    /// No later answer may be older.
    floor: i64,
}

/// What this arbiter knows of its place in the cluster.
struct Store {
    place: String,
    prefix: String,
    memory: Memory,
    /// Newest that was seen.
    revision: AtomicI64,
}

impl Store {
    fn key(&self) -> String {
        format!("{}/store", self.prefix)
    }

    fn generations(&self, vm_id: &str) -> String {
        format!("{}/{vm_id}/gen/", self.prefix)
    }

    /// Keys are in the order of the numbers.
    fn generation(&self, vm_id: &str, generation: u64) -> String {
        format!("{}{generation:020}", self.generations(vm_id))
    }

    /// Behind the last generation: `0` follows `/`.
    fn generations_end(&self, vm_id: &str) -> String {
        format!("{}/{vm_id}/gen0", self.prefix)
    }

    fn mark(&self, vm_id: &str, token: &str) -> Result<String, ArbiterError> {
        Ok(format!(
            "{}/{}/mark/{}",
            self.prefix,
            check_name(vm_id)?,
            check_name(token)?
        ))
    }

    /// Finds out, before anything is asked of it, that the store is the one that was met first; makes its id if nothing
    /// was met yet.
    async fn meet(&self, client: &mut Client, floor: i64) -> Result<Met, Failure> {
        let key = self.key();
        let mut got = client.get(key.as_str(), None).await?;
        if got.kvs().is_empty() {
            self.header(got.header(), floor)?;
            if let Some(first) = self.memory.store() {
                let reason = format!("has no {key} any more, it was store {first}: emptied or exchanged?");
                return Err(corrupt(&self.place, reason).into());
            }
            let id = crate::primary::unique_name("store").map_err(|e| Failure::Unanswered(e.to_string()))?;
            let absent = Compare::version(key.as_str(), CompareOp::Equal, 0);
            let make = TxnOp::put(key.as_str(), store_record(&id), None);
            client.txn(Txn::new().when([absent]).and_then([make])).await?;
            got = client.get(key.as_str(), None).await?;
        }
        let (cluster, revision) = self.header(got.header(), floor)?;
        let Some((id, record)) = value(&got).and_then(|text| Some((store_in(text)?, text.to_string()))) else {
            return Err(corrupt(&self.place, format!("{key} does not hold the id of a store of ours")).into());
        };
        let id = format!("{id}-{cluster:016x}");
        self.memory.met(&self.place, &id)?;
        Ok(Met {
            id,
            record,
            cluster,
            floor: revision,
        })
    }

    /// Cluster and revision of an answer, which must not be older than `floor`.
    fn header(&self, header: Option<&ResponseHeader>, floor: i64) -> Result<(u64, i64), Failure> {
        let Some(header) = header else {
            return Err(Failure::Unanswered("an answer without a header".into()));
        };
        let (cluster, revision) = (header.cluster_id(), header.revision());
        if revision < floor {
            let reason = format!("its revision is {revision}, it was {floor}: was an old backup put back?");
            return Err(corrupt(&self.place, reason).into());
        }
        self.revision.fetch_max(revision, Ordering::SeqCst);
        Ok((cluster, revision))
    }

    /// The winner in the first key of `got`; `None`: there is none.
    fn winner(&self, got: &GetResponse, vm_id: &str, generation: u64) -> Result<Option<String>, Failure> {
        if got.kvs().is_empty() {
            return Ok(None);
        }
        match value(got).and_then(|text| winner_in(text, vm_id, generation)) {
            Some(winner) => Ok(Some(winner)),
            None => {
                let key = self.generation(vm_id, generation);
                let reason = format!("{key} is not ours; nobody can be told the winner until it is repaired");
                Err(corrupt(&self.place, reason).into())
            }
        }
    }

    /// For [`Store::newest_of`].
    fn newest_options() -> GetOptions {
        GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Key, SortOrder::Descend)
            .with_limit(1)
    }

    /// The register, from the last key of the generations.
    fn newest_of(&self, got: &GetResponse, vm_id: &str) -> Result<Register, Failure> {
        let Some(last) = got.kvs().first() else {
            return Ok(Register {
                generation: 0,
                winner: None,
            });
        };
        let key = String::from_utf8_lossy(last.key());
        let number = key.strip_prefix(&self.generations(vm_id)).filter(|n| n.len() == 20);
        let Some(generation) = number.and_then(|n| n.parse().ok()) else {
            return Err(corrupt(&self.place, format!("{key} is not a key of ours")).into());
        };
        let winner = self.winner(got, vm_id, generation)?;
        Ok(Register { generation, winner })
    }

    /// The transaction that raises `expected` to `next` in `node`'s name, or reads why it does not.
    fn raise(&self, met: &Met, question: &Question) -> Txn {
        let Question {
            vm_id,
            expected,
            next,
            node,
            before,
        } = question;
        let end = self.generations_end(vm_id);
        let mut when = vec![
            Compare::value(self.key(), CompareOp::Equal, met.record.as_str()),
            Compare::version(self.generation(vm_id, *next), CompareOp::Equal, 0).with_range(end),
        ];
        if *expected > 0 {
            when.push(Compare::version(
                self.generation(vm_id, *expected),
                CompareOp::Greater,
                0,
            ));
        }
        if let Some(Register {
            generation,
            winner: Some(winner),
        }) = before
        {
            let seen = record(vm_id, *generation, winner);
            when.push(Compare::value(
                self.generation(vm_id, *generation),
                CompareOp::Equal,
                seen,
            ));
        }
        let make = TxnOp::put(self.generation(vm_id, *next), record(vm_id, *next, node), None);
        let look = [
            TxnOp::get(self.generation(vm_id, *next), None),
            TxnOp::get(self.generations(vm_id), Some(Self::newest_options())),
        ];
        Txn::new().when(when).and_then([make]).or_else(look)
    }

    async fn test_and_set(&self, client: &mut Client, met: Met, question: &Question) -> Result<Verdict, Failure> {
        let Question {
            vm_id,
            expected,
            next,
            node,
            before,
        } = question;
        let place = format!("register of {vm_id} in {}", self.place);
        let done = client.txn(self.raise(&met, question)).await?;
        let (cluster, _) = self.header(done.header(), met.floor)?;
        if cluster != met.cluster {
            return Err(corrupt(&self.place, "another cluster answered").into());
        }
        let winner = if done.succeeded() {
            node.clone()
        } else {
            let answers = done.op_responses();
            let [TxnOpResponse::Get(theirs), TxnOpResponse::Get(newest)] = answers.as_slice() else {
                return Err(Failure::Unanswered("an answer to another question".into()));
            };
            match self.winner(theirs, vm_id, *next)? {
                Some(winner) => winner,
                None => {
                    let newest = self.newest_of(newest, vm_id)?;
                    if newest.generation < *expected {
                        return Err(went_back(&place, vm_id, newest.generation, *expected).into());
                    }
                    self.memory.saw(&place, vm_id, before.as_ref(), &newest)?;
                    let reason = match newest.generation == *expected {
                        true => "the store was exchanged or put back while it was asked",
                        false => "a generation is missing below the newest one",
                    };
                    return Err(corrupt(&place, reason).into());
                }
            }
        };
        let before = before.as_ref();
        Ok(self.memory.decided(&place, vm_id, before, *next, winner, node)?)
    }
}

/// A test-and-set.
#[derive(Clone)]
struct Question {
    vm_id: String,
    expected: u64,
    next: u64,
    node: String,
    /// Seen before.
    before: Option<Register>,
}

/// The first value, if it is text.
fn value(got: &GetResponse) -> Option<&str> {
    got.kvs().first().and_then(|kv| std::str::from_utf8(kv.value()).ok())
}

impl Arbiter for EtcdArbiter {
    fn test_and_set(&self, vm_id: &str, expected: u64, node: &str) -> Result<Verdict, ArbiterError> {
        let place = format!("register of {vm_id} in {}", self.store.place);
        let question = Question {
            vm_id: check_name(vm_id)?.into(),
            expected,
            next: expected
                .checked_add(1)
                .ok_or_else(|| corrupt(&place, "the generation is at its end"))?,
            node: check_name(node)?.into(),
            before: self.store.memory.register(vm_id),
        };
        self.ask(BOUND, move |mut client, store, met| {
            let question = question.clone();
            async move { store.test_and_set(&mut client, met, &question).await }
        })
    }

    fn read(&self, vm_id: &str) -> Result<Register, ArbiterError> {
        let vm_id = check_name(vm_id)?.to_string();
        let before = self.store.memory.register(&vm_id);
        self.ask(BOUND, move |mut client, store, met| {
            let (vm_id, before) = (vm_id.clone(), before.clone());
            async move {
                let options = Store::newest_options();
                let got = client.get(store.generations(&vm_id), Some(options)).await?;
                store.header(got.header(), met.floor)?;
                let register = store.newest_of(&got, &vm_id)?;
                store.memory.saw(&store.place, &vm_id, before.as_ref(), &register)?;
                Ok(register)
            }
        })
    }

    fn store_id(&self) -> Result<String, ArbiterError> {
        self.ask(BOUND, |_, _, met| async move { Ok(met.id) })
    }

    fn mark(&self, vm_id: &str, token: &str) -> Result<(), ArbiterError> {
        let key = self.store.mark(vm_id, token)?;
        self.ask(BOUND, move |mut client, _, _| {
            let key = key.clone();
            async move {
                let lease = client.lease_grant(MARK_TTL, None).await?.id();
                client.put(key, "", Some(PutOptions::new().with_lease(lease))).await?;
                Ok(())
            }
        })
    }

    fn sees(&self, vm_id: &str, token: &str) -> Result<bool, ArbiterError> {
        let key = self.store.mark(vm_id, token)?;
        self.ask(BOUND, move |mut client, store, met| {
            let key = key.clone();
            async move {
                let got = client.get(key, None).await?;
                store.header(got.header(), met.floor)?;
                Ok(!got.kvs().is_empty())
            }
        })
    }

    fn unmark(&self, vm_id: &str, token: &str) {
        let Ok(key) = self.store.mark(vm_id, token) else { return };
        let gone = self.ask(UNMARK_BOUND, move |mut client, _, _| {
            let key = key.clone();
            async move {
                client.delete(key, None).await?;
                Ok(())
            }
        });
        if let Err(e) = gone {
            log::debug!("ft: a mark stays in the arbiter until its lease ends: {e}");
        }
    }
}
