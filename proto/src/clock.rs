//! What a clock that is wrong looks like from here.

use std::fmt::Display;

/// What rustls says of a certificate whose time has not come, and of one whose time is over.
const NOT_YET: &str = "certificate not valid yet";
const EXPIRED: &str = "certificate expired";

/// A sentence about a connection that failed; where a certificate's time is what is wrong, it names this node's
/// clock, which reads `now`.
#[must_use]
pub fn blamed(sentence: String, now: impl Display) -> String {
    if sentence.contains(NOT_YET) {
        format!(
            "{sentence}; this node's clock reads {now}: is that right? If not, set it and let NTP keep it"
        )
    } else if sentence.contains(EXPIRED) {
        format!(
            "{sentence}; this node's clock reads {now}: if that is right, the server's certificate has to be renewed"
        )
    } else {
        sentence
    }
}

#[cfg(test)]
mod tests {
    use super::blamed;

    #[test]
    fn only_certificates_out_of_their_time_blame_a_clock() {
        let told = |sentence: &str| blamed(sentence.to_owned(), "2026-01-01T00:00:00Z");
        assert!(
            told("TLS: invalid peer certificate: certificate not valid yet: …").contains("let NTP keep it")
        );
        let expired = told("invalid peer certificate: certificate expired: …");
        assert!(expired.contains("2026-01-01T00:00:00Z") && expired.contains("renewed"), "{expired}");
        for other in ["connection refused", "invalid peer certificate: UnknownIssuer"] {
            assert_eq!(told(other), other);
        }
    }
}
