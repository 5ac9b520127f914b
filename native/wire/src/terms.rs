use rmp::Marker;

/// How many terms a payload becomes, without building any: every value is one, and so is every byte of a string, whose
/// code points are values of their own to Erlang. Counted to the first fault, or until there are more than `enough`.
///
/// A payload has at most as many terms as bytes.
pub fn count_terms(payload: &[u8], enough: usize) -> usize {
    let (mut rest, mut terms) = (payload, 0);
    while terms <= enough {
        let Some((&marker, behind)) = rest.split_first() else { break };
        let (content, characters) = match Marker::from_u8(marker) {
            Marker::FixPos(_)
            | Marker::FixNeg(_)
            | Marker::Null
            | Marker::True
            | Marker::False
            | Marker::FixArray(_)
            | Marker::FixMap(_) => (Some(0), 0),
            Marker::U8 | Marker::I8 => (Some(1), 0),
            Marker::U16 | Marker::I16 | Marker::Array16 | Marker::Map16 => (Some(2), 0),
            Marker::U32 | Marker::I32 | Marker::F32 | Marker::Array32 | Marker::Map32 => (Some(4), 0),
            Marker::U64 | Marker::I64 | Marker::F64 => (Some(8), 0),
            Marker::Bin8 => (length::<1>(behind), 0),
            Marker::Bin16 => (length::<2>(behind), 0),
            Marker::Bin32 => (length::<4>(behind), 0),
            Marker::FixStr(len) => (Some(len.into()), usize::from(len)),
            Marker::Str8 => characters::<1>(behind),
            Marker::Str16 => characters::<2>(behind),
            Marker::Str32 => characters::<4>(behind),
            Marker::FixExt1
            | Marker::FixExt2
            | Marker::FixExt4
            | Marker::FixExt8
            | Marker::FixExt16
            | Marker::Ext8
            | Marker::Ext16
            | Marker::Ext32
            | Marker::Reserved => (None, 0),
        };
        let Some(behind) = content.and_then(|content| behind.get(content..)) else { break };
        terms += 1 + characters;
        rest = behind;
    }
    terms
}

/// The bytes of a length of `N` bytes and of what it announces.
fn length<const N: usize>(bytes: &[u8]) -> Option<usize> {
    let announced = bytes.first_chunk::<N>()?.iter().fold(0usize, |len, &byte| (len << 8) | usize::from(byte));
    announced.checked_add(N)
}

fn characters<const N: usize>(bytes: &[u8]) -> (Option<usize>, usize) {
    let content = length::<N>(bytes);
    (content, content.map_or(0, |content| content - N))
}
