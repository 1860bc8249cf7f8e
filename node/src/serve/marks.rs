//! Marks in a text that comes piece by piece: stop strings, and what calls of tools begin with.

/// Where the first of `marks` begins.
pub(crate) fn find<'a>(text: &str, marks: impl IntoIterator<Item = &'a str>) -> Option<usize> {
    marks.into_iter().filter_map(|mark| text.find(mark)).min()
}

/// From where on `text` may yet become one of `marks`: its length, where nothing of it can.
pub(crate) fn may_begin<'a>(text: &str, marks: impl IntoIterator<Item = &'a str> + Clone) -> usize {
    let begins = |at: &usize| {
        let tail = text.get(*at..).unwrap_or_default();
        marks.clone().into_iter().any(|mark| mark.starts_with(tail))
    };
    let starts = text.char_indices().map(|(at, _)| at);
    starts.into_iter().find(begins).unwrap_or(text.len())
}
