//! Whether checkpoints go before what else the host does.
//!
//! That costs a little for each thread. It pays where vCPUs wait for processors that others have; where none waits, or where
//! they are late for another reason (an idle processor that takes long to wake), it does not. So it is tried when vCPUs are
//! late again and again, and given up for a while when they still are.

/// Checkpoints that are hurried at a time.
const HURRIED: u32 = 64;

/// What a checkpoint with a late vCPU counts; one without takes 1 off. And how much is too much: rare ones are not, one in
/// two soon is.
const LATE: u32 = 4;
const TOO_LATE: u32 = 12;

/// Late ones of those that were hurried, from which on that did not help; and for how many checkpoints it is not tried then.
const NO_HELP: u32 = HURRIED / 2;
const NOT_TRIED: u32 = 4096;

/// Decides before each checkpoint, and hears after it whether a vCPU was late.
#[derive(Debug, Default)]
pub(super) struct Rush {
    lateness: u32,
    /// Checkpoints that are still to be hurried, and late ones among those that were.
    left: u32,
    late: u32,
    not_tried: u32,
}

impl Rush {
    /// Whether the next checkpoint is to be hurried.
    pub(super) fn is_on(&self) -> bool {
        self.left > 0
    }

    /// A checkpoint was begun, and a vCPU was late or none.
    pub(super) fn note(&mut self, late: bool) {
        if self.left > 0 {
            self.left -= 1;
            self.late += u32::from(late);
            if self.late >= NO_HELP {
                (self.left, self.not_tried) = (0, NOT_TRIED);
            }
        } else if self.not_tried > 0 {
            self.not_tried -= 1;
        } else if late {
            self.lateness += LATE;
            if self.lateness >= TOO_LATE {
                (self.lateness, self.left, self.late) = (0, HURRIED, 0);
            }
        } else {
            self.lateness = self.lateness.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hurried ones of `count` checkpoints; one of so many is late, if hurried, and if not (0: none).
    fn hurried(count: u32, late: [u32; 2]) -> u32 {
        let mut rush = Rush::default();
        let mut hurried = 0;
        for n in 0..count {
            let one_of = late[usize::from(!rush.is_on())];
            hurried += u32::from(rush.is_on());
            rush.note(one_of > 0 && n % one_of == 0);
        }
        hurried
    }

    #[test]
    fn it_is_on_where_vcpus_are_late_often_and_it_helps() {
        assert_eq!(hurried(10_000, [0, 0]), 0);
        assert_eq!(hurried(10_000, [0, 10]), 0, "rare ones");
        assert!(hurried(10_000, [0, 2]) > 8_000);
        assert!(hurried(10_000, [5, 1]) > 9_000);
        assert!(hurried(10_000, [1, 1]) < 200, "it does not help");
    }
}
