//! How long calls took: CNI's to us, ours to the admin APIs and the API server. They are made in many places, so
//! their histograms are this process's, like its log.

use std::sync::LazyLock;
use std::time::Instant;

use podtether_proto::node::{CniError, code};
use prometheus::HistogramVec;

use super::table;

static CNI: LazyLock<Result<HistogramVec, prometheus::Error>> = LazyLock::new(|| {
    let buckets = [0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
    let (opts, labels) = table::buckets("podtether_cni_duration_seconds", &buckets)?;
    let made = HistogramVec::new(opts, labels)?;
    // There from the beginning: of a series that begins with its first call no increase is seen.
    for verb in ["ADD", "CHECK", "DEL", "GC"] {
        made.with_label_values(&["ok", verb]);
    }
    for result in ["bad_config", "link", "needs_action", "refused", "try_again"] {
        made.with_label_values(&[result, "ADD"]);
    }
    Ok(made)
});

static API: LazyLock<Result<HistogramVec, prometheus::Error>> = LazyLock::new(|| {
    let buckets = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
    let (opts, labels) = table::buckets("podtether_api_duration_seconds", &buckets)?;
    HistogramVec::new(opts, labels)
});

/// Both, to be registered.
pub(super) fn histograms() -> Result<[HistogramVec; 2], prometheus::Error> {
    let made = |histogram: &Result<HistogramVec, prometheus::Error>| match histogram {
        Ok(made) => Ok(made.clone()),
        Err(e) => Err(prometheus::Error::Msg(e.to_string())),
    };
    Ok([made(&CNI)?, made(&API)?])
}

/// Whom a call was for.
#[derive(Debug, Clone, Copy)]
pub enum Api {
    /// A tailnet's admin API.
    Tailnet,
    /// The Kubernetes API server.
    Kubernetes,
}

/// Notes a call that began at `begun` and has ended; `result` is one of a few words.
pub fn api_called(api: Api, result: &'static str, begun: Instant) {
    let api = match api {
        Api::Tailnet => "tailnet",
        Api::Kubernetes => "kubernetes",
    };
    if let Ok(histogram) = &*API {
        histogram.with_label_values(&[api, result]).observe(begun.elapsed().as_secs_f64());
    }
}

/// What came of a call that was answered with this status.
#[must_use]
pub fn of_status(status: u16) -> &'static str {
    match status {
        200..=299 => "ok",
        404 => "not_found",
        409 | 422 => "conflict",
        401 | 403 => "forbidden",
        410 => "gone",
        429 => "rate_limited",
        400..=499 => "refused",
        _ => "failed",
    }
}

/// Notes a CNI call that began at `begun` and is answered.
pub fn cni_answered<T>(verb: &'static str, answer: &Result<T, CniError>, begun: Instant) {
    let result = answer.as_ref().err().map_or("ok", |error| of_code(error.code));
    if let Ok(histogram) = &*CNI {
        histogram.with_label_values(&[result, verb]).observe(begun.elapsed().as_secs_f64());
    }
}

fn of_code(error: u32) -> &'static str {
    match error {
        code::TRY_AGAIN => "try_again",
        code::REFUSED => "refused",
        code::NEEDS_ACTION => "needs_action",
        code::LINK => "link",
        code::CHECK_FAILED => "check_failed",
        code::CLEANUP => "cleanup",
        code::INTERFACE_EXISTS => "interface_exists",
        code::BAD_CONFIG => "bad_config",
        _ => "bad_call",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_noted_under_few_words() {
        for code in 0..=200 {
            let error = CniError { code, msg: "x".into(), details: String::new() };
            cni_answered::<()>("CHECK", &Err(error), Instant::now());
        }
        cni_answered("CHECK", &Ok(()), Instant::now());
        (100..=600).for_each(|status| api_called(Api::Tailnet, of_status(status), Instant::now()));
        let [cni, api] = histograms().unwrap();
        let count =
            |histogram: &HistogramVec, words: &[&str]| histogram.with_label_values(words).get_sample_count();
        // Other tests of this process call as well.
        assert!(count(&cni, &["ok", "CHECK"]) >= 1 && count(&cni, &["refused", "CHECK"]) >= 1);
        assert!(count(&api, &["tailnet", "ok"]) >= 100 && count(&api, &["tailnet", "rate_limited"]) >= 1);
        let series = |histogram: &HistogramVec| {
            let families = prometheus::core::Collector::collect(histogram);
            families.iter().map(|family| family.get_metric().len()).sum::<usize>()
        };
        assert!(series(&cni) <= 10 * 4 && series(&api) <= 8 * 2, "{} {}", series(&cni), series(&api));
    }
}
