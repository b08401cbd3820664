//! The arbiter on a shared directory.
//!
//! `<vm>.gen-<n>` is made by link(2), which is atomic on local file systems and on NFS: whoever makes it has won
//! generation n. Its content, written and synced under a temporary name before, names the winner. Files are never
//! changed or removed: a late contender for an old generation must still find out that it lost. `store.id` holds a random
//! id, so that the empty directory below a mount point that was unmounted is not taken for a store.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::memory::{Memory, corrupt, went_back};
use super::record::{MAX_RECORD, check_name, record, store_in, store_record, winner_in};
use super::{Arbiter, ArbiterError, Register, Verdict};

/// Holds the store's id.
const STORE_FILE: &str = "store.id";

/// Test-and-set by link(2).
pub struct FileArbiter {
    dir: PathBuf,
    memory: Memory,
}

impl FileArbiter {
    /// The directory must exist.
    pub fn open(dir: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Self {
            dir: dir.to_path_buf(),
            memory: Memory::default(),
        };
        arbiter.is_there()?;
        Ok(arbiter)
    }

    fn is_there(&self) -> Result<(), ArbiterError> {
        if !fs::metadata(&self.dir).map_err(|e| self.failed(e))?.is_dir() {
            return Err(self.failed(io::ErrorKind::NotADirectory.into()));
        }
        Ok(())
    }

    fn place(&self) -> String {
        format!("directory {}", self.dir.display())
    }

    fn failed(&self, source: io::Error) -> ArbiterError {
        ArbiterError::Store {
            what: self.place(),
            source,
        }
    }

    fn path(&self, vm_id: &str, generation: u64) -> PathBuf {
        self.dir.join(format!("{vm_id}.gen-{generation}"))
    }

    fn mark_path(&self, vm_id: &str, token: &str) -> Result<PathBuf, ArbiterError> {
        Ok(self
            .dir
            .join(format!("{}.mark-{}", check_name(vm_id)?, check_name(token)?)))
    }

    /// The content of a file; `None`: there is none of this name.
    fn text(&self, path: &Path) -> Result<Option<String>, ArbiterError> {
        let failed = |source| ArbiterError::Store {
            what: format!("file {}", path.display()),
            source,
        };
        let mut text = String::new();
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        match file.take(MAX_RECORD).read_to_string(&mut text) {
            Ok(_) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => Ok(Some(String::new())),
            Err(e) => Err(failed(e)),
        }
    }

    /// Who won `generation`; `None`: nobody yet.
    fn winner(&self, vm_id: &str, generation: u64) -> Result<Option<String>, ArbiterError> {
        let path = self.path(vm_id, generation);
        let Some(text) = self.text(&path)? else { return Ok(None) };
        let reason = "is not a register file of ours; nobody can be told the winner until it is repaired";
        match winner_in(&text, vm_id, generation) {
            Some(winner) => Ok(Some(winner)),
            None => Err(corrupt(&format!("file {}", path.display()), reason)),
        }
    }

    fn newest(&self, vm_id: &str) -> Result<Register, ArbiterError> {
        let prefix = format!("{vm_id}.gen-");
        let mut generation = 0;
        for entry in fs::read_dir(&self.dir).map_err(|e| self.failed(e))? {
            let name = entry.map_err(|e| self.failed(e))?.file_name();
            let number = name
                .to_str()
                .and_then(|n| n.strip_prefix(&prefix))
                .and_then(|n| n.parse().ok());
            generation = generation.max(number.unwrap_or(0));
        }
        let winner = match generation {
            0 => None,
            _ => self.winner(vm_id, generation)?,
        };
        Ok(Register { generation, winner })
    }

    /// The directory is the one that was met first, and has an id.
    fn is_ours(&self) -> Result<String, ArbiterError> {
        self.is_there()?;
        let path = self.dir.join(STORE_FILE);
        if self.text(&path)?.is_none() {
            if let Some(first) = self.memory.store() {
                let reason = format!("has no {STORE_FILE} any more, it was store {first}: unmounted or emptied?");
                return Err(corrupt(&self.place(), reason));
            }
            let id = crate::primary::unique_name("store").map_err(|e| self.failed(io::Error::other(e)))?;
            match self.link(&path, &format!(".{id}"), &store_record(&id)) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(self.failed(e)),
                _ => {}
            }
        }
        let Some(id) = self.text(&path)?.as_deref().and_then(store_in) else {
            let reason = "does not hold the id of a store of ours";
            return Err(corrupt(&format!("file {}", path.display()), reason));
        };
        self.memory.met(&self.place(), &id)?;
        Ok(id)
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Writes the content under the `temporary` name, links it to `path`. `AlreadyExists`: somebody was first.
    fn link(&self, path: &Path, temporary: &str, content: &str) -> io::Result<()> {
        let temporary = self.dir.join(temporary);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        let linked = fs::hard_link(&temporary, path);
        let _ = fs::remove_file(&temporary);
        linked?;
        self.sync_dir()
    }
}

impl Arbiter for FileArbiter {
    fn test_and_set(&self, vm_id: &str, expected: u64, node: &str) -> Result<Verdict, ArbiterError> {
        check_name(vm_id)?;
        check_name(node)?;
        let place = format!("register of {vm_id} in {}", self.dir.display());
        let next = expected
            .checked_add(1)
            .ok_or_else(|| corrupt(&place, "the generation is at its end"))?;
        let before = self.memory.register(vm_id);
        self.is_ours()?;
        if self.winner(vm_id, next)?.is_none() {
            let newest = self.newest(vm_id)?;
            if newest.generation < expected {
                return Err(went_back(&place, vm_id, newest.generation, expected));
            }
            if newest.generation == expected {
                self.memory.saw(&place, vm_id, before.as_ref(), &newest)?;
                let temporary = format!(".{vm_id}.{next}.{node}");
                match self.link(&self.path(vm_id, next), &temporary, &record(vm_id, next, node)) {
                    Ok(()) => {}
                    // Also the answer to our own link(2) when the first reply of an NFS server was lost.
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(self.failed(e)),
                }
            } else if self.winner(vm_id, next)?.is_none() {
                // Looked at again: somebody may have been first in between.
                return Err(corrupt(&place, "a generation is missing below the newest one"));
            }
        }
        let winner = self
            .winner(vm_id, next)?
            .ok_or_else(|| corrupt(&place, "a register file vanished while it was read"))?;
        if winner == node {
            self.sync_dir().map_err(|e| self.failed(e))?;
        }
        // Again: it may have been unmounted in between.
        self.is_ours()?;
        self.memory.decided(&place, vm_id, before.as_ref(), next, winner, node)
    }

    fn read(&self, vm_id: &str) -> Result<Register, ArbiterError> {
        check_name(vm_id)?;
        let before = self.memory.register(vm_id);
        self.is_ours()?;
        let register = self.newest(vm_id)?;
        self.memory.saw(&self.place(), vm_id, before.as_ref(), &register)?;
        Ok(register)
    }

    fn store_id(&self) -> Result<String, ArbiterError> {
        self.is_ours()
    }

    fn mark(&self, vm_id: &str, token: &str) -> Result<(), ArbiterError> {
        let path = self.mark_path(vm_id, token)?;
        let made = File::create(&path)
            .and_then(|file| file.sync_all())
            .and_then(|()| self.sync_dir());
        made.map_err(|source| ArbiterError::Store {
            what: format!("file {}", path.display()),
            source,
        })
    }

    fn sees(&self, vm_id: &str, token: &str) -> Result<bool, ArbiterError> {
        let path = self.mark_path(vm_id, token)?;
        path.try_exists().map_err(|source| ArbiterError::Store {
            what: format!("file {}", path.display()),
            source,
        })
    }

    fn unmark(&self, vm_id: &str, token: &str) {
        if let Ok(path) = self.mark_path(vm_id, token) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use super::*;

    fn arbiter() -> (tempfile::TempDir, FileArbiter) {
        let dir = tempfile::tempdir().unwrap();
        let arbiter = FileArbiter::open(dir.path()).unwrap();
        (dir, arbiter)
    }

    #[test]
    fn one_winner_per_generation_and_it_may_ask_again() {
        let (_dir, arbiter) = arbiter();
        assert_eq!(
            arbiter.read("vm").unwrap(),
            Register {
                generation: 0,
                winner: None
            }
        );
        assert_eq!(arbiter.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
        assert_eq!(
            arbiter.test_and_set("vm", 0, "b").unwrap(),
            Verdict::Lost { winner: "a".into() }
        );
        assert_eq!(arbiter.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
        assert_eq!(arbiter.test_and_set("vm", 1, "b").unwrap(), Verdict::Won);
        assert_eq!(
            arbiter.test_and_set("vm", 0, "c").unwrap(),
            Verdict::Lost { winner: "a".into() }
        );
        assert_eq!(
            arbiter.read("vm").unwrap(),
            Register {
                generation: 2,
                winner: Some("b".into())
            }
        );
        assert_eq!(arbiter.read("other").unwrap().generation, 0);
    }

    #[test]
    fn a_race_of_many_has_one_winner_whom_all_agree_on() {
        let (dir, _) = arbiter();
        for generation in 0..20 {
            let barrier = Arc::new(Barrier::new(8));
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    let (arbiter, barrier) = (FileArbiter::open(dir.path()).unwrap(), barrier.clone());
                    std::thread::spawn(move || {
                        barrier.wait();
                        let node = format!("node-{n}");
                        match arbiter.test_and_set("vm", generation, &node).unwrap() {
                            Verdict::Won => (true, node),
                            Verdict::Lost { winner } => (false, winner),
                        }
                    })
                })
                .collect();
            let answers: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            assert_eq!(answers.iter().filter(|(won, _)| *won).count(), 1, "{answers:?}");
            assert!(answers.iter().all(|(_, winner)| *winner == answers[0].1), "{answers:?}");
        }
        assert!(
            std::fs::read_dir(dir.path())
                .unwrap()
                .all(|e| !e.unwrap().file_name().to_str().unwrap().starts_with('.'))
        );
    }

    #[test]
    fn foreign_content_is_an_error_and_never_a_win() {
        let (dir, arbiter) = arbiter();
        let file = dir.path().join("vm.gen-1");
        let good = record("vm", 1, "a");
        for bad in [
            "",
            "winner a\n",
            &good[1..],
            &good.replace("winner a", "winner b"),
            &"x".repeat(100_000),
        ] {
            std::fs::write(&file, bad).unwrap();
            assert!(
                matches!(arbiter.test_and_set("vm", 0, "a"), Err(ArbiterError::Corrupt { .. })),
                "{bad:.20}"
            );
        }
        std::fs::write(&file, [0xff; 32]).unwrap();
        assert!(matches!(
            arbiter.test_and_set("vm", 0, "a"),
            Err(ArbiterError::Corrupt { .. })
        ));
        std::fs::write(&file, &good).unwrap();
        assert_eq!(arbiter.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
        std::fs::write(dir.path().join("vm.gen-7"), record("vm", 7, "a")).unwrap();
        assert!(matches!(
            arbiter.test_and_set("vm", 1, "a"),
            Err(ArbiterError::Corrupt { .. })
        ));
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let (_dir, arbiter) = arbiter();
        for bad in ["", "../x", "a/b", "a b", &"x".repeat(65)] {
            assert!(matches!(
                arbiter.test_and_set(bad, 0, "a"),
                Err(ArbiterError::BadName(_))
            ));
            assert!(matches!(
                arbiter.test_and_set("vm", 0, bad),
                Err(ArbiterError::BadName(_))
            ));
            assert!(matches!(arbiter.mark("vm", bad), Err(ArbiterError::BadName(_))));
        }
    }

    #[test]
    fn marks_come_and_go_and_a_lost_directory_is_no_answer() {
        let (dir, arbiter) = arbiter();
        arbiter.mark("vm", "t").unwrap();
        assert!(arbiter.sees("vm", "t").unwrap());
        arbiter.unmark("vm", "t");
        assert!(!arbiter.sees("vm", "t").unwrap());
        drop(dir);
        assert!(matches!(
            arbiter.test_and_set("vm", 0, "a"),
            Err(ArbiterError::Store { .. })
        ));
        assert!(matches!(
            super::super::open("etcd:h"),
            Err(ArbiterError::BadDescription { .. })
        ));
        assert!(super::super::open("file:/does/not/exist").is_err());
    }

    #[test]
    fn an_unmounted_or_exchanged_store_is_not_ours() {
        let (dir, arbiter) = arbiter();
        let id = arbiter.store_id().unwrap();
        assert_eq!(FileArbiter::open(dir.path()).unwrap().store_id().unwrap(), id);
        let (mounted, away) = (dir.path().join("store.id"), dir.path().join("away"));
        std::fs::rename(&mounted, &away).unwrap();
        for _ in 0..2 {
            let error = arbiter.test_and_set("vm", 0, "a").unwrap_err();
            assert!(error.to_string().contains("unmounted"), "{error}");
        }
        assert!(matches!(arbiter.read("vm"), Err(ArbiterError::Corrupt { .. })));
        // Somebody else takes the empty directory for a fresh store.
        assert_ne!(FileArbiter::open(dir.path()).unwrap().store_id().unwrap(), id);
        let error = arbiter.test_and_set("vm", 0, "a").unwrap_err();
        assert!(error.to_string().contains("exchanged"), "{error}");
        std::fs::write(&mounted, "x").unwrap();
        assert!(matches!(arbiter.store_id(), Err(ArbiterError::Corrupt { .. })));
        std::fs::rename(&away, &mounted).unwrap();
        assert_eq!(arbiter.test_and_set("vm", 0, "a").unwrap(), Verdict::Won);
    }

    #[test]
    fn a_store_that_went_back_is_never_won() {
        let (dir, _) = arbiter();
        let open = || FileArbiter::open(dir.path()).unwrap();
        let first = open();
        for (expected, node) in [(0, "a"), (1, "b")] {
            assert_eq!(first.test_and_set("vm", expected, node).unwrap(), Verdict::Won);
        }
        let (late, waiting) = (open(), open());
        assert_eq!(late.read("vm").unwrap().generation, 2);
        assert_eq!(waiting.read("vm").unwrap().generation, 2);
        std::fs::remove_file(dir.path().join("vm.gen-2")).unwrap();
        // Even one that has seen nothing yet.
        for arbiter in [&late, &open()] {
            let error = arbiter.test_and_set("vm", 2, "a").unwrap_err();
            assert!(error.to_string().contains("old backup"), "{error}");
        }
        assert!(matches!(late.read("vm"), Err(ArbiterError::Corrupt { .. })));
        assert!(matches!(
            late.test_and_set("vm", 1, "c"),
            Err(ArbiterError::Corrupt { .. })
        ));
        // The same generation again, but another history.
        assert_eq!(open().test_and_set("vm", 1, "c").unwrap(), Verdict::Won);
        let error = waiting.test_and_set("vm", 2, "a").unwrap_err();
        assert!(error.to_string().contains("old backup"), "{error}");
        assert!(!dir.path().join("vm.gen-3").exists());
    }
}
