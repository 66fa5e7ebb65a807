//! Requests from control to node ("c2n"): an HTTP/1 request inside a ping request, whose raw HTTP answer
//! goes back through the control session.
//!
//! Only `/echo` is served. Anything else that a stock node would do on control's behalf (logs, debug
//! pages, updates, posture) is none of a pod's business.

/// Longest request looked at, bytes.
const MAX_REQUEST: usize = 64 << 10;
const MAX_HEADERS: usize = 32;

/// The raw HTTP/1.1 answer to a raw HTTP/1 request.
#[must_use]
pub fn answer(request: &[u8]) -> Vec<u8> {
    let (status, body) = match Request::parse(request) {
        None => ("400 Bad Request", b"not an HTTP request\n".as_slice()),
        Some(Request { path: "/echo", body, .. }) => ("200 OK", body),
        Some(Request { path, .. }) if path.starts_with("/debug/") => {
            ("403 Forbidden", b"not served\n".as_slice())
        }
        Some(_) => ("404 Not Found", b"not served\n".as_slice()),
    };
    let kind = if status.starts_with("200") { "application/octet-stream" } else { "text/plain" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// What is needed of a request.
struct Request<'a> {
    path: &'a str,
    body: &'a [u8],
}

impl<'a> Request<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        if bytes.len() > MAX_REQUEST {
            return None;
        }
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = std::str::from_utf8(bytes.get(..end)?).ok()?;
        let mut lines = head.split("\r\n");
        let mut parts = lines.next()?.split(' ');
        let (method, target, version) = (parts.next()?, parts.next()?, parts.next()?);
        let known = !method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase());
        if !known || !version.starts_with("HTTP/1.") || parts.next().is_some() {
            return None;
        }
        let path = target.split(['?', '#']).next().filter(|path| path.starts_with('/'))?;
        let mut length = 0;
        for (count, line) in lines.enumerate() {
            let (name, value) = line.split_once(':').filter(|_| count < MAX_HEADERS)?;
            if name.eq_ignore_ascii_case("transfer-encoding") {
                return None;
            }
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().ok()?;
            }
        }
        let body = bytes.get(end + 4..)?.get(..length)?;
        Some(Self { path, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echo_and_nothing_else() {
        let table: &[(&str, &str, &str)] = &[
            ("POST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi", "200 OK", "hi"),
            ("POST /echo HTTP/1.0\r\ncontent-length: 2\r\nHost: x\r\n\r\nhigh", "200 OK", "hi"),
            ("GET /echo?x=y HTTP/1.1\r\n\r\n", "200 OK", ""),
            ("GET /debug/goroutines HTTP/1.1\r\n\r\n", "403 Forbidden", "not served\n"),
            ("POST /update HTTP/1.1\r\n\r\n", "404 Not Found", "not served\n"),
            ("GET /echo/x HTTP/1.1\r\n\r\n", "404 Not Found", "not served\n"),
            ("", "400", "not an HTTP request\n"),
            ("GET /echo", "400", "not an HTTP request\n"),
            ("get /echo HTTP/1.1\r\n\r\n", "400", "not an HTTP request\n"),
            ("GET http://10.0.0.1/echo HTTP/1.1\r\n\r\n", "400", "not an HTTP request\n"),
            ("GET /echo HTTP/2\r\n\r\n", "400", "not an HTTP request\n"),
            ("POST /echo HTTP/1.1\r\nContent-Length: 3\r\n\r\nhi", "400", "not an HTTP request\n"),
            ("POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "400", "not an HTTP request\n"),
        ];
        for (request, status, body) in table {
            let answer = String::from_utf8(answer(request.as_bytes())).unwrap();
            let (head, got) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {head}");
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{request:?}: {head}");
            assert_eq!(got, *body, "{request:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn fuzz_requests_are_answered(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            proptest::prop_assert!(answer(&bytes).starts_with(b"HTTP/1.1 "));
        }

        #[test]
        fn fuzz_texts_are_answered(text in "(GET|POST) /[a-z/]{0,9} HTTP/1.[01]\r\n([A-Z-]{1,8}:.{0,9}\r\n){0,3}\r\n.{0,9}") {
            proptest::prop_assert!(answer(text.as_bytes()).starts_with(b"HTTP/1.1 "));
        }
    }
}
