/// Length of a frame's header in bytes.
pub const HEADER_LEN: usize = 8;

/// No [`Limits::max_depth`] above this has an effect: [`value`](crate::value) works by recursion, and
/// what terms become may do so too.
pub const MAX_DEPTH_CEILING: usize = 512;

/// No [`Limits::max_frame`] above this has an effect: the header's length field has 32 bits.
pub const MAX_FRAME_CEILING: usize = (u32::MAX as usize).saturating_add(HEADER_LEN);

/// What is refused for its size or cost, when writing and when reading alike.
///
/// Values above [`MAX_FRAME_CEILING`] and [`MAX_DEPTH_CEILING`] count as those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest frame, header and payload together, in bytes. Default: 16 MiB.
    pub max_frame: usize,
    /// The most containers (arrays and maps) inside one another; the topmost counts 1. Default: 64.
    pub max_depth: usize,
    /// The most terms of one payload, as [`count_terms`](crate::count_terms) counts them: what it costs to read does not
    /// follow from its bytes alone, because one byte becomes up to 64 in Erlang's memory. Default: 1,000,000.
    pub max_terms: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_frame: 16 * 1024 * 1024, max_depth: 64, max_terms: 1_000_000 }
    }
}

impl Limits {
    pub(crate) fn frame(self) -> usize {
        self.max_frame.min(MAX_FRAME_CEILING)
    }

    pub(crate) fn depth(self) -> usize {
        self.max_depth.min(MAX_DEPTH_CEILING)
    }
}
