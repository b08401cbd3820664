//! The arbiter on a shared directory.
//!
//! `<vm>.gen-<n>` is made by link(2), which is atomic on local file systems and on NFS: whoever makes it has won
//! generation n. Its content, written and synced under a temporary name before, names the winner. Files are never
//! changed or removed: a late contender for an old generation must still find out that it lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{Arbiter, ArbiterError, Register, Verdict};

/// More than any register file of ours has.
const MAX_CONTENT: u64 = 512;

/// Test-and-set by link(2).
pub struct FileArbiter {
    dir: PathBuf,
}

fn check_name(name: &str) -> Result<&str, ArbiterError> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
        return Err(ArbiterError::BadName(name.chars().take(80).collect()));
    }
    Ok(name)
}

fn content(vm_id: &str, generation: u64, node: &str) -> String {
    let body = format!("vm {vm_id}\ngeneration {generation}\nwinner {node}\n");
    let sum = crc32c::crc32c(body.as_bytes());
    format!("{body}crc32c {sum:08x}\n")
}

impl FileArbiter {
    /// The directory must exist.
    pub fn open(dir: &Path) -> Result<Self, ArbiterError> {
        let store = |source| ArbiterError::Store {
            what: format!("directory {}", dir.display()),
            source,
        };
        if !fs::metadata(dir).map_err(store)?.is_dir() {
            return Err(store(io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    fn path(&self, vm_id: &str, generation: u64) -> PathBuf {
        self.dir.join(format!("{vm_id}.gen-{generation}"))
    }

    fn mark_path(&self, vm_id: &str, token: &str) -> Result<PathBuf, ArbiterError> {
        Ok(self
            .dir
            .join(format!("{}.mark-{}", check_name(vm_id)?, check_name(token)?)))
    }

    /// Who won `generation`; `None`: nobody yet.
    fn winner(&self, vm_id: &str, generation: u64) -> Result<Option<String>, ArbiterError> {
        let path = self.path(vm_id, generation);
        let what = || format!("file {}", path.display());
        let mut text = String::new();
        let opened = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ArbiterError::Store { what: what(), source }),
        };
        match opened.take(MAX_CONTENT).read_to_string(&mut text) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidData => text.clear(),
            Err(source) => return Err(ArbiterError::Store { what: what(), source }),
        }
        let node = text.lines().find_map(|line| line.strip_prefix("winner ")).unwrap_or("");
        if check_name(node).is_err() || text != content(vm_id, generation, node) {
            let reason =
                "is not a register file of ours; nobody can be told the winner until it is repaired".to_string();
            return Err(ArbiterError::Corrupt { place: what(), reason });
        }
        Ok(Some(node.to_string()))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Writes the content under a name of `node`'s own, links it to `path`. `AlreadyExists`: somebody was first.
    fn link(&self, path: &Path, vm_id: &str, generation: u64, node: &str) -> io::Result<()> {
        let temporary = self.dir.join(format!(".{vm_id}.{generation}.{node}"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        file.write_all(content(vm_id, generation, node).as_bytes())?;
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
        let store = |source| ArbiterError::Store {
            what: format!("directory {}", self.dir.display()),
            source,
        };
        let corrupt = |reason: &str| {
            let place = format!("register of {vm_id} in {}", self.dir.display());
            ArbiterError::Corrupt {
                place,
                reason: reason.to_string(),
            }
        };
        let next = expected
            .checked_add(1)
            .ok_or_else(|| corrupt("the generation is at its end"))?;
        if self.winner(vm_id, next)?.is_none() {
            // Looked at again: somebody may have been first in between.
            if self.read(vm_id)?.generation > expected && self.winner(vm_id, next)?.is_none() {
                return Err(corrupt("a generation is missing below the newest one"));
            }
            match self.link(&self.path(vm_id, next), vm_id, next, node) {
                Ok(()) => {}
                // Also the answer to our own link(2) when the first reply of an NFS server was lost.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(store(source)),
            }
        }
        match self.winner(vm_id, next)? {
            Some(winner) if winner == node => {
                self.sync_dir().map_err(store)?;
                Ok(Verdict::Won)
            }
            Some(winner) => Ok(Verdict::Lost { winner }),
            None => Err(corrupt("a register file vanished while it was read")),
        }
    }

    fn read(&self, vm_id: &str) -> Result<Register, ArbiterError> {
        let prefix = format!("{}.gen-", check_name(vm_id)?);
        let store = |source| ArbiterError::Store {
            what: format!("directory {}", self.dir.display()),
            source,
        };
        let mut generation = 0;
        for entry in fs::read_dir(&self.dir).map_err(store)? {
            let name = entry.map_err(store)?.file_name();
            let number = name
                .to_str()
                .and_then(|n| n.strip_prefix(&prefix))
                .and_then(|n| n.parse().ok());
            generation = generation.max(number.unwrap_or(0));
        }
        let winner = if generation == 0 {
            None
        } else {
            self.winner(vm_id, generation)?
        };
        Ok(Register { generation, winner })
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
        let good = content("vm", 1, "a");
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
        std::fs::write(dir.path().join("vm.gen-7"), content("vm", 7, "a")).unwrap();
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
            Err(ArbiterError::BadDescription(_))
        ));
        assert!(super::super::open("file:/does/not/exist").is_err());
    }
}
