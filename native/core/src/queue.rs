//! The messages that wait for a peer's link: accepted ones, in order, then those of waiting calls; and separately those
//! for another key than the link's.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::types::Fingerprint;

/// Messages that a link takes over while it is busy or has no stream to spare: some milliseconds of a fast sender.
const MAX_ACCEPTED: usize = 1024;

/// How long a message without a deadline is owed after its link died.
pub const OWED_WITHOUT_DEADLINE: Duration = Duration::from_secs(60);

/// What a queue needs to know of a message.
pub trait Queued {
    /// Its sender has its `ok`. Otherwise a call waits.
    fn is_accepted(&self) -> bool;
    /// Its caller has not given up.
    fn is_wanted(&self) -> bool;
    fn queued_at(&self) -> Instant;
    fn deadline(&self) -> Option<Instant>;
    fn set_deadline(&mut self, deadline: Instant);
    /// The only key whose holder may get it.
    fn key(&self) -> Option<Fingerprint>;
}

#[derive(Debug)]
pub struct Queue<J> {
    /// Accepted messages, then waiting calls.
    jobs: VecDeque<J>,
    /// Messages for another key than the live link's, in the order of the queue. Empty while callers see no link.
    parked: VecDeque<J>,
    /// The keys that the present race began for; `None` among them: a message that names none. Their callers may give up
    /// before a link is up, which the next call finds.
    sought: Vec<Option<Fingerprint>>,
    /// The earliest deadline, of messages that were accepted by a session too.
    expiry: Option<Instant>,
}

/// What a queue gives up.
#[derive(Debug)]
pub struct GivenUp<J> {
    pub queued: Vec<J>,
    /// They were for another key than the link's.
    pub parked: Vec<J>,
}

impl<J> Default for Queue<J> {
    fn default() -> Self {
        Self { jobs: VecDeque::new(), parked: VecDeque::new(), sought: Vec::new(), expiry: None }
    }
}

impl<J: Queued> Queue<J> {
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Messages and calls, parked ones included.
    pub fn len(&self) -> usize {
        self.jobs.len() + self.parked.len()
    }

    pub fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Whether a message may be accepted without waiting. It would take the room that a call waits for.
    pub fn may_accept(&self) -> bool {
        self.jobs.back().is_none_or(Queued::is_accepted) && self.jobs.len() < MAX_ACCEPTED
    }

    /// Queues a job. Returns whether the task that empties the queue has to look.
    pub fn push(&mut self, job: J) -> bool {
        let expiry = earliest(self.expiry, job.deadline());
        let news = self.jobs.is_empty() || self.expiry != expiry || !job.is_accepted();
        self.expiry = expiry;
        match job.is_accepted() {
            // Behind a call that waits for room, it would hold its own room for as long as that call waits.
            true => self.jobs.insert(self.first_waiting(), job),
            false => self.jobs.push_back(job),
        }
        news
    }

    pub fn pop(&mut self) -> Option<J> {
        self.jobs.pop_front()
    }

    /// Puts a job back that was next.
    pub fn put_back(&mut self, job: J) {
        self.expiry = earliest(self.expiry, job.deadline());
        match job.is_accepted() {
            true => self.jobs.push_front(job),
            false => self.jobs.insert(self.first_waiting(), job),
        }
    }

    /// Keeps a job apart that the link's peer may not get.
    pub fn park(&mut self, mut job: J, now: Instant) {
        if job.is_accepted() {
            limit(&mut job, now);
            self.expiry = earliest(self.expiry, job.deadline());
        }
        self.parked.push_back(job);
    }

    /// Callers see no link any more: any link is of use to parked messages again.
    pub fn unpark(&mut self) {
        while let Some(job) = self.parked.pop_back() {
            self.put_back(job);
        }
    }

    /// The link died. Accepted messages without a deadline have one from now on, and the session's may be over.
    pub fn detach(&mut self, now: Instant) {
        self.jobs.iter_mut().take_while(|job| job.is_accepted()).for_each(|job| limit(job, now));
        self.expiry = Some(now);
    }

    /// Takes everything, in order.
    pub fn take(&mut self) -> VecDeque<J> {
        std::mem::take(&mut self.jobs)
    }

    /// The next time at which [`Queue::give_up`] may find something.
    pub fn expiry(&self) -> Option<Instant> {
        self.expiry
    }

    /// There is a deadline to watch.
    pub fn expect(&mut self, deadline: Option<Instant>) {
        self.expiry = earliest(self.expiry, deadline);
    }

    /// Takes what is over, and what no caller wants any more. `others`: the next deadline of messages elsewhere.
    pub fn give_up(&mut self, others: Option<Instant>, now: Instant) -> GivenUp<J> {
        let queued = split_off(&mut self.jobs, |job| !is_over(job, now) && job.is_wanted());
        let parked = split_off(&mut self.parked, |job| !is_over(job, now) && job.is_wanted());
        let left = self.jobs.iter().chain(&self.parked).filter_map(Queued::deadline);
        self.expiry = left.chain(others).min();
        GivenUp { queued, parked }
    }

    /// No link could be made. Takes the calls that fail with that: those from before the race began, or all of them
    /// unless `later_stay`. Accepted messages keep their deadlines.
    pub fn fail(&mut self, begun: Instant, later_stay: bool) -> Vec<J> {
        split_off(&mut self.jobs, |job| job.is_accepted() || (later_stay && job.queued_at() > begun))
    }

    /// No holder of another key was found. Takes the calls that fail with that: a later one may name another key, or
    /// have come with other candidates.
    pub fn fail_parked(&mut self, begun: Instant) -> Vec<J> {
        self.sought.clear();
        split_off(&mut self.parked, |job| job.is_accepted() || job.queued_at() > begun)
    }

    /// Whether a call waits for a link.
    pub fn is_waited_for(&self, now: Instant) -> bool {
        self.jobs.iter().rev().take_while(|job| !job.is_accepted()).any(|job| !is_over(job, now))
    }

    /// Whether a call waits for the holder of another key.
    pub fn is_other_key_waited_for(&self, now: Instant) -> bool {
        self.parked.iter().any(|job| !job.is_accepted() && !is_over(job, now))
    }

    /// A race begins. `linked`: beside a link that callers see. `session`: the keys of messages that a session owes.
    pub fn seek(&mut self, linked: bool, session: impl Iterator<Item = Option<Fingerprint>>) {
        self.sought = self.waiting_keys(linked, session);
    }

    /// The race has ended with a link, or is not needed any more.
    pub fn found(&mut self) {
        self.sought.clear();
    }

    pub fn sought(&self) -> &[Option<Fingerprint>] {
        &self.sought
    }

    /// For each message that no live link takes, the only key that may get it, if it names one. Without repetitions.
    pub fn waiting_keys(
        &self,
        linked: bool,
        session: impl Iterator<Item = Option<Fingerprint>>,
    ) -> Vec<Option<Fingerprint>> {
        if linked {
            let keys = distinct(self.parked_keys().into_iter().chain(self.sought.iter().copied()));
            if !keys.is_empty() {
                return keys;
            }
        }
        distinct(self.jobs.iter().map(Queued::key).chain(session))
    }

    pub fn parked_keys(&self) -> Vec<Option<Fingerprint>> {
        distinct(self.parked.iter().map(Queued::key))
    }

    /// Whether a link that shows this key is sought beside the one that callers see.
    pub fn seeks(&self, key: Fingerprint) -> bool {
        self.parked.iter().map(Queued::key).chain(self.sought.iter().copied()).any(|sought| sought == Some(key))
    }

    fn first_waiting(&self) -> usize {
        // As a rule no call waits, and the search would cost each message that is queued.
        match self.jobs.back() {
            Some(last) if !last.is_accepted() => self.jobs.partition_point(Queued::is_accepted),
            _ => self.jobs.len(),
        }
    }
}

/// Takes the jobs that do not stay.
fn split_off<J>(jobs: &mut VecDeque<J>, stays: impl Fn(&J) -> bool) -> Vec<J> {
    let (kept, gone): (VecDeque<J>, VecDeque<J>) = std::mem::take(jobs).into_iter().partition(stays);
    *jobs = kept;
    gone.into()
}

fn limit(job: &mut impl Queued, now: Instant) {
    if job.deadline().is_none() {
        job.set_deadline(now + OWED_WITHOUT_DEADLINE);
    }
}

fn is_over(job: &impl Queued, now: Instant) -> bool {
    job.deadline().is_some_and(|deadline| deadline <= now)
}

pub fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
}

pub fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut distinct = Vec::new();
    for one in all {
        if !distinct.contains(&one) {
            distinct.push(one);
        }
    }
    distinct
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Job {
        name: &'static str,
        accepted: bool,
        at: Instant,
        deadline: Option<Instant>,
        key: Option<Fingerprint>,
        wanted: bool,
    }

    impl Queued for Job {
        fn is_accepted(&self) -> bool {
            self.accepted
        }
        fn is_wanted(&self) -> bool {
            self.wanted
        }
        fn queued_at(&self) -> Instant {
            self.at
        }
        fn deadline(&self) -> Option<Instant> {
            self.deadline
        }
        fn set_deadline(&mut self, deadline: Instant) {
            self.deadline = Some(deadline);
        }
        fn key(&self) -> Option<Fingerprint> {
            self.key
        }
    }

    fn job(name: &'static str, accepted: bool, at: Instant) -> Job {
        Job { name, accepted, at, deadline: None, key: None, wanted: true }
    }

    fn names(jobs: impl IntoIterator<Item = Job>) -> Vec<&'static str> {
        jobs.into_iter().map(|job| job.name).collect()
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn accepted_messages_come_before_waiting_calls_and_keep_their_order() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        for (name, accepted) in [("a", true), ("call", false), ("b", true), ("last call", false)] {
            queue.push(job(name, accepted, now));
        }
        let first = queue.pop().unwrap();
        queue.put_back(first);
        let call = queue.jobs.remove(2).unwrap();
        queue.put_back(call);
        assert_eq!(names(queue.take()), ["a", "b", "call", "last call"]);
    }

    #[test]
    fn a_message_is_not_accepted_behind_a_waiting_call_or_without_end() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        assert!(queue.may_accept());
        for _ in 0..MAX_ACCEPTED {
            queue.push(job("a", true, now));
        }
        assert!(!queue.may_accept());
        queue.take();
        queue.push(job("call", false, now));
        assert!(!queue.may_accept());
    }

    #[test]
    fn a_job_is_news_to_an_empty_queue_with_an_earlier_deadline_or_with_a_call() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        let due = |seconds| Job { deadline: Some(now + seconds * SECOND), ..job("a", true, now) };
        assert!(queue.push(due(3)));
        assert!(!queue.push(due(3)) && !queue.push(due(4)));
        assert!(queue.push(due(2)));
        assert!(queue.push(job("call", false, now)));
        assert_eq!(queue.expiry(), Some(now + 2 * SECOND));
    }

    #[test]
    fn expired_and_cancelled_messages_are_removed_and_the_next_deadline_is_known() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        queue.push(Job { deadline: Some(now), ..job("over", true, now) });
        queue.push(Job { deadline: Some(now + SECOND), ..job("due", true, now) });
        queue.push(Job { wanted: false, ..job("unwanted", false, now) });
        queue.park(Job { deadline: Some(now), ..job("parked", false, now) }, now);
        let GivenUp { queued, parked } = queue.give_up(Some(now + 5 * SECOND), now);
        assert_eq!((names(queued), names(parked)), (vec!["over", "unwanted"], vec!["parked"]));
        assert_eq!(queue.expiry(), Some(now + SECOND));
        assert_eq!(names(queue.take()), ["due"]);
    }

    #[test]
    fn parked_messages_return_to_their_place_and_accepted_ones_have_a_deadline() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        queue.push(job("later", true, now));
        queue.push(job("later call", false, now));
        queue.park(job("a", true, now), now);
        queue.park(job("b", true, now), now);
        queue.park(job("call", false, now), now);
        assert_eq!(queue.expiry(), Some(now + OWED_WITHOUT_DEADLINE));
        queue.unpark();
        assert_eq!(names(queue.take()), ["a", "b", "later", "call", "later call"]);
    }

    #[test]
    fn a_link_that_dies_leaves_each_accepted_message_a_deadline() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        queue.push(job("a", true, now));
        queue.push(job("call", false, now));
        queue.detach(now);
        assert_eq!(queue.expiry(), Some(now), "the session's messages are looked at");
        assert_eq!(queue.take()[0].deadline, Some(now + OWED_WITHOUT_DEADLINE));
    }

    #[test]
    fn calls_fail_with_the_race_that_they_waited_for() {
        let (begun, later) = (Instant::now(), Instant::now() + SECOND);
        for (later_stay, failed) in [(true, vec!["call"]), (false, vec!["call", "later call"])] {
            let mut queue = Queue::default();
            queue.push(job("a", true, begun));
            queue.push(job("call", false, begun));
            queue.push(job("later call", false, later));
            assert_eq!(names(queue.fail(begun, later_stay)), failed);
            assert!(!queue.is_empty());
        }
        let mut queue = Queue::default();
        queue.park(job("a", true, begun), begun);
        queue.park(job("call", false, begun), begun);
        queue.park(job("later call", false, later), begun);
        assert_eq!(names(queue.fail_parked(begun)), ["call"]);
        assert_eq!(queue.len(), 2);
    }

    #[test]
    fn keys_are_sought_for_parked_messages_and_for_callers_that_gave_up() {
        let (now, mut queue) = (Instant::now(), Queue::default());
        let [one, two] = [1, 2].map(|n| Fingerprint::from([n; 32]));
        queue.push(Job { key: Some(one), ..job("a", true, now) });
        queue.seek(false, [Some(one), None].into_iter());
        assert_eq!(queue.sought(), [Some(one), None]);
        queue.take();
        assert_eq!(queue.waiting_keys(true, [].into_iter()), [Some(one), None], "the caller has given up");
        assert!(queue.seeks(one) && !queue.seeks(two));
        queue.found();
        queue.park(Job { key: Some(two), ..job("b", true, now) }, now);
        assert!(queue.seeks(two) && !queue.seeks(one));
        assert_eq!(queue.waiting_keys(true, [Some(one)].into_iter()), [Some(two)]);
        assert_eq!(queue.waiting_keys(false, [Some(one)].into_iter()), [Some(one)]);
    }
}
