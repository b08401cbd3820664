//! The steps: one function for each kind of event, then what they share.

use super::*;

impl PrimaryState {
    pub(super) fn pace(&mut self, now: Nanos, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        let percent = self.pacing.percent(&self.limits, self.lag(), self.has_room(), now);
        if percent != self.percent {
            self.percent = percent;
            out.push(Action::Throttle(percent));
        }
        if self.deadline().is_some_and(|at| now >= at) {
            self.checkpointing = true;
            self.pacing.end(&self.limits, now);
            out.push(Action::Checkpoint);
        }
    }

    pub(super) fn tick(&mut self, heard: Nanos, now: Nanos, out: &mut Vec<Action>) {
        let expected = self.generation;
        match &mut self.phase {
            Phase::Ended(_) => return,
            Phase::Arbitrating { arbitration, .. } => {
                if arbitration.ask_again(now) {
                    out.push(Action::AskArbiter { expected });
                }
                return;
            }
            Phase::Disarming { deadline, .. } | Phase::Offered { deadline } if now >= *deadline => {
                let reason = "the backup lives but did not answer in time".to_string();
                return self.lose(reason, now, out);
            }
            _ => {}
        }
        if self.silence.is_dead(heard, now) {
            let silent = now.saturating_sub(heard) / ms(1);
            return self.lose(format!("the backup was silent for {silent} ms"), now, out);
        }
        let deaf = now.saturating_sub(self.lease.until().max(self.armed_at));
        if self.armed && deaf > DEAF_TIMEOUT.max(2 * self.limits.timeout) {
            let reason = format!("the backup lives, but has read nothing for {} ms", deaf / ms(1));
            self.lose(reason, now, out);
        }
    }

    pub(super) fn checkpointed(&mut self, bytes: u64, dirty_bytes: u64, anew: u64, now: Nanos, out: &mut Vec<Action>) {
        if !self.checkpointing || self.is_over() {
            return;
        }
        self.checkpointing = false;
        let ended = self.epoch;
        self.epoch += 1;
        self.pacing.next(dirty_bytes, now);
        (self.running_bytes, self.output) = (0, false);
        if matches!(self.phase, Phase::Syncing) {
            (self.armed, self.armed_at) = (true, now);
            self.phase = Phase::Running;
            self.silence = Silence::new(self.limits.timeout, now);
        }
        if !matches!(self.phase, Phase::Running) {
            // The backup was lost while the checkpoint was taken. Its outputs stay held; the guest may run.
            out.push(Action::Resume);
            return;
        }
        self.in_flight.push_back((ended, bytes));
        if anew > 0 {
            self.damage.places -= anew as i64;
            self.damage.sent_with = Some(ended);
        }
        if self.handover != Handover::No {
            self.handover = Handover::Last(ended);
        }
        self.still = matches!(self.handover, Handover::Last(_)) || self.lag() >= self.limits.max_lag;
        if !self.still {
            out.push(Action::Resume);
        }
    }

    pub(super) fn peer(&mut self, echo: Nanos, message: FromBackup, now: Nanos, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Arbitrating { .. }) {
            return;
        }
        if echo > now {
            return self.lose("the backup returned a stamp from the future".into(), now, out);
        }
        if echo > 0 {
            self.lease.renew(echo);
        }
        match message {
            FromBackup::Heartbeat => {}
            FromBackup::Ack(epoch) => {
                if epoch >= self.epoch {
                    return self.lose(
                        format!("the backup acknowledged epoch {epoch}, which was not sent"),
                        now,
                        out,
                    );
                }
                // Acknowledgements count for all epochs before; an older one may arrive after a newer.
                self.committed = self.committed.max(epoch);
                while self.in_flight.front().is_some_and(|(e, _)| *e <= epoch) {
                    self.in_flight.pop_front();
                }
                if self.damage.sent_with.is_some_and(|with| with <= epoch) {
                    self.damage.sent_with = None;
                }
                self.go_on(now, out);
            }
            FromBackup::Mismatch { places, what } => {
                self.damage.places = self.damage.places.saturating_add(places as i64);
                self.damage.what = what;
            }
            FromBackup::Disarmed => match self.phase {
                Phase::Disarming { end, .. } => self.alone(end, out),
                _ => return self.lose("the backup answers what it was not asked".into(), now, out),
            },
            FromBackup::Bye(reason) => {
                self.reason = Some(format!("the backup left and will not take over: {reason}"));
                if self.armed {
                    self.alone(End::Failed, out);
                } else {
                    self.abandon(End::Failed, out);
                }
            }
            FromBackup::HandedOver(generation) => match self.phase {
                Phase::Offered { .. } => {
                    self.generation = generation;
                    self.stop(
                        format!("the VM was handed over to the backup, which won generation {generation}"),
                        out,
                    );
                }
                _ => return self.lose("the backup says it took over, unasked".into(), now, out),
            },
            FromBackup::HandoverFailed { generation, reason } => match self.phase {
                Phase::Offered { .. } if generation == self.generation + 1 => {
                    // It spent that generation and is out of the race: ours is the next.
                    self.generation = generation;
                    return self.lose(format!("the backup could not become the VM: {reason}"), now, out);
                }
                _ => return self.lose("the backup says its takeover failed, unasked".into(), now, out),
            },
        }
        self.release(now, out);
    }

    /// The guest that stood still for want of room runs again when there is some.
    fn go_on(&mut self, now: Nanos, out: &mut Vec<Action>) {
        if self.still && self.handover == Handover::No && self.lag() < self.limits.max_lag {
            self.still = false;
            self.pacing.restart(now);
            out.push(Action::Resume);
        }
    }

    pub(super) fn has_written(&mut self, epoch: u64, now: Nanos, out: &mut Vec<Action>) {
        let Some(shared) = &mut self.shared else { return };
        shared.written = shared.written.max(epoch);
        if !matches!(self.phase, Phase::Ended(_) | Phase::Arbitrating { .. }) {
            self.go_on(now, out);
            self.release(now, out);
        }
    }

    /// Outputs of committed epochs leave as long as the lease holds (R1, R4); after that, a handover may be offered.
    pub(super) fn release(&mut self, now: Nanos, out: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Arbitrating { .. }) {
            return;
        }
        let may = self.may_release(now);
        let (mut ready, mut written) = (self.committed, u64::MAX);
        if let Some(shared) = &mut self.shared {
            written = shared.written;
            if shared.durable {
                ready = written;
            }
            if self.committed > shared.asked && may {
                shared.asked = self.committed;
                out.push(Action::Write(self.committed));
            }
        }
        if ready > self.released && may {
            self.released = ready;
            out.push(Action::Release(ready));
        }
        if let (Handover::Last(epoch), Phase::Running) = (self.handover, &self.phase)
            && self.released >= epoch
            && written >= epoch
        {
            self.phase = Phase::Offered {
                deadline: now + ANSWER_TIMEOUT,
            };
            out.push(Action::Send(ToBackup::Handover(epoch)));
        }
    }

    /// The backup does not count any more.
    pub(super) fn lose(&mut self, reason: String, now: Nanos, out: &mut Vec<Action>) {
        let end = match &self.phase {
            Phase::Ended(_) | Phase::Arbitrating { .. } => return,
            Phase::Disarming { end, .. } => *end,
            Phase::Syncing if !self.armed => {
                self.reason = Some(reason);
                return self.abandon(End::Failed, out);
            }
            _ => End::Solo,
        };
        self.reason = Some(reason);
        let mut arbitration = Arbitration::begin();
        arbitration.ask_again(now);
        self.phase = Phase::Arbitrating { arbitration, end };
        out.push(Action::Disconnect);
        out.push(Action::AskArbiter {
            expected: self.generation,
        });
    }

    pub(super) fn answered(&mut self, answer: Answer, now: Nanos, out: &mut Vec<Action>) {
        let Phase::Arbitrating { arbitration, end } = &mut self.phase else {
            return;
        };
        match answer {
            Answer::Unknown { reason } => arbitration.unanswered(reason, now),
            Answer::Won => {
                let end = *end;
                self.generation += 1;
                self.alone(end, out);
            }
            Answer::Lost { winner } => {
                self.generation += 1;
                let before = self.reason.take().unwrap_or_default();
                self.stop(
                    format!(
                        "{before}; node {winner} won generation {} in the arbiter",
                        self.generation
                    ),
                    out,
                );
            }
        }
    }

    /// FT ends by our own will.
    pub(super) fn leave(&mut self, end: End, reason: String, now: Nanos, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Syncing if !self.armed => {
                self.reason = Some(reason);
                self.abandon(end, out);
            }
            Phase::Running => {
                self.reason = Some(reason.clone());
                self.phase = Phase::Disarming {
                    end,
                    deadline: now + ANSWER_TIMEOUT,
                };
                out.push(Action::Send(ToBackup::Disarm(reason)));
            }
            _ => {}
        }
    }

    pub(super) fn alone(&mut self, end: End, out: &mut Vec<Action>) {
        self.finish(end.state());
        out.push(Action::Disconnect);
        out.push(Action::GoAlone);
    }

    pub(super) fn abandon(&mut self, end: End, out: &mut Vec<Action>) {
        self.finish(end.state());
        out.push(Action::Disconnect);
        out.push(Action::Abandon);
    }

    pub(super) fn stop(&mut self, reason: String, out: &mut Vec<Action>) {
        self.finish(FtState::Stopped);
        self.reason = Some(reason.clone());
        out.push(Action::Disconnect);
        out.push(Action::Stop(reason));
    }

    pub(super) fn finish(&mut self, state: FtState) {
        self.phase = Phase::Ended(state);
        self.in_flight.clear();
        (self.running_bytes, self.output, self.still, self.percent) = (0, false, false, 100);
    }
}
