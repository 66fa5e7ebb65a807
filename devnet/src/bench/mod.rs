//! What podtether costs.
//!
//! | part | module |
//! |---|---|
//! | pods that join all at once | [`joins`] |

pub mod joins;
