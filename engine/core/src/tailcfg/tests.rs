//! Tables over real-looking messages.
