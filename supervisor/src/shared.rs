//! Answers that cost every engine a call, made once for all who ask at a time.
//!
//! An answer is never older than its question: who comes while one is made waits for the next. Between two
//! there is a pause of four times what the last one took, so that whoever asks in a loop takes at most a fifth
//! of the time, however many engines there are. What nobody waits for is not kept: of a full node it is megabytes.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, MutexGuard};

/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// How long to wait before an answer is made again, when the last one took `took`.
#[must_use]
pub fn pause(took: Duration) -> Duration {
    (took * 4).min(MAX_PAUSE)
}

/// One kind of answer.
#[derive(Debug)]
pub struct Shared<T> {
    /// Held by who makes an answer; when the next may begin.
    not_before: Mutex<Option<Instant>>,
    /// How many were begun.
    begun: AtomicU64,
    /// Who has asked and has no answer yet.
    asking: AtomicUsize,
    /// The last one that is whole, with its number, while somebody asks.
    last: std::sync::Mutex<Option<(u64, Arc<T>)>>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self {
            not_before: Mutex::default(),
            begun: AtomicU64::new(0),
            asking: AtomicUsize::new(0),
            last: std::sync::Mutex::default(),
        }
    }
}

/// An answer being made. Who gives up on its way has cost as much as it took.
struct Making<'a> {
    not_before: MutexGuard<'a, Option<Instant>>,
    start: Instant,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        *self.not_before = Some(Instant::now() + pause(self.start.elapsed()));
    }
}

/// One who asks. The last one gone takes the answer along.
struct Asking<'a, T>(&'a Shared<T>);

impl<'a, T> Asking<'a, T> {
    fn new(shared: &'a Shared<T>) -> Self {
        shared.asking.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl<T> Drop for Asking<'_, T> {
    fn drop(&mut self) {
        let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        if self.0.asking.fetch_sub(1, Ordering::Relaxed) == 1 {
            *last = None;
        }
    }
}

impl<T> Shared<T> {
    /// An answer that was begun after this call: another's, or the one that `make` gives.
    pub async fn get(&self, make: impl Future<Output = T>) -> Arc<T> {
        let _asking = Asking::new(self);
        let before = self.begun.load(Ordering::Relaxed);
        let not_before = self.not_before.lock().await;
        if let Some((number, answer)) = &*self.last.lock().unwrap_or_else(PoisonError::into_inner)
            && *number > before
        {
            return Arc::clone(answer);
        }
        if let Some(at) = *not_before {
            tokio::time::sleep_until(at.into()).await;
        }
        let number = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let making = Making { not_before, start: Instant::now() };
        let answer = Arc::new(make.await);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, Arc::clone(&answer)));
        drop(making);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn pauses() {
        for (took, wait) in [(0, 0), (1, 4), (100, 400), (500, 2000), (5000, 2000)] {
            assert_eq!(pause(Duration::from_millis(took)), Duration::from_millis(wait), "{took}");
        }
    }

    #[tokio::test]
    async fn many_who_ask_at_a_time_get_one_answer_and_it_is_fresh() {
        let shared = Arc::new(Shared::<u32>::default());
        let made = Arc::new(AtomicU32::new(0));
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let first = {
            let (shared, made) = (Arc::clone(&shared), Arc::clone(&made));
            tokio::spawn(async move {
                let make = async {
                    let n = made.fetch_add(1, Ordering::Relaxed) + 1;
                    finished.await.unwrap();
                    n
                };
                *shared.get(make).await
            })
        };
        while made.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        // These came while the first was made: it may be older than what they want to know.
        let others: Vec<_> = (0..100)
            .map(|_| {
                let (shared, made) = (Arc::clone(&shared), Arc::clone(&made));
                tokio::spawn(
                    async move { *shared.get(async { made.fetch_add(1, Ordering::Relaxed) + 1 }).await },
                )
            })
            .collect();
        tokio::task::yield_now().await;
        finish.send(()).unwrap();
        assert_eq!(first.await.unwrap(), 1);
        for other in others {
            assert_eq!(other.await.unwrap(), 2);
        }
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert!(shared.last.lock().unwrap().is_none(), "nobody asks any more");
        assert_eq!(*shared.get(async { 3 }).await, 3, "asked later");
    }

    #[tokio::test]
    async fn asking_in_a_loop_takes_a_fifth_of_the_time() {
        let shared = Shared::<()>::default();
        let start = Instant::now();
        let mut busy = Duration::ZERO;
        let mut answers = 0;
        while start.elapsed() < Duration::from_millis(400) {
            let begun = std::cell::Cell::new(Duration::ZERO);
            shared
                .get(async {
                    let at = Instant::now();
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    begun.set(at.elapsed());
                })
                .await;
            busy += begun.get();
            answers += 1;
        }
        // The last answer has no pause behind it.
        assert!(answers >= 2 && busy * 4 <= start.elapsed() + busy, "{answers} in {busy:?}");
    }

    #[tokio::test]
    async fn who_gives_up_does_not_hold_the_others() {
        let shared = Arc::new(Shared::<u32>::default());
        let silent = Arc::clone(&shared);
        let gone = tokio::spawn(async move { *silent.get(std::future::pending()).await });
        while shared.begun.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        gone.abort();
        assert!(gone.await.is_err());
        assert_eq!(*shared.get(async { 7 }).await, 7);
    }
}
