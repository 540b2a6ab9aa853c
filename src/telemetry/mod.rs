//! What a running node tells about itself. (Metrics are part of the HTTP server.)

pub mod logging;
pub mod operations;
mod rolling;
pub mod seldom;
