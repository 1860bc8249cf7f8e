//! The methods of Python's texts and dictionaries that chat templates call.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Nesting of values that are written as JSON; conversations have three levels, descriptions of tools some ten.
const JSON_DEPTH_MAX: usize = 32;

/// The widest step of an indented JSON text.
const INDENT_MAX: usize = 16;

/// Calls a method that the template language does not have by itself.
pub(super) fn call(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::Map, _) => on_map(state, value, method, args),
        (_, Some(text)) => on_text(text, method, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn on_map(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "items" => state.apply_filter("items", std::slice::from_ref(value)),
        "keys" => Ok(value.try_iter()?.collect::<Vec<_>>().into()),
        "values" => {
            let values = value.try_iter()?.map(|key| value.get_item(&key));
            Ok(values.collect::<Result<Vec<_>, _>>()?.into())
        }
        "get" => {
            let (key, default): (Value, Option<Value>) = from_args(args)?;
            let found = value.get_item(&key)?;
            match found.is_undefined() {
                true => Ok(default.unwrap_or(Value::from(()))),
                false => Ok(found),
            }
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn on_text(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let letters = || -> Result<Vec<char>, Error> {
        let (letters,): (Option<String>,) = from_args(args)?;
        Ok(letters.unwrap_or_default().chars().collect())
    };
    let stripped = |letters: &[char], letter: char| match letters.is_empty() {
        true => letter.is_whitespace(),
        false => letters.contains(&letter),
    };
    Ok(match method {
        "strip" => {
            let letters = letters()?;
            text.trim_matches(|letter| stripped(&letters, letter)).into()
        }
        "lstrip" => {
            let letters = letters()?;
            text.trim_start_matches(|letter| stripped(&letters, letter)).into()
        }
        "rstrip" => {
            let letters = letters()?;
            text.trim_end_matches(|letter| stripped(&letters, letter)).into()
        }
        "startswith" => {
            let (start,): (&str,) = from_args(args)?;
            text.starts_with(start).into()
        }
        "endswith" => {
            let (end,): (&str,) = from_args(args)?;
            text.ends_with(end).into()
        }
        "replace" => {
            let (from, to): (&str, &str) = from_args(args)?;
            text.replace(from, to).into()
        }
        "split" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            split(text, separator, most)
        }
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "title" | "capitalize" => {
            let mut letters = text.chars();
            let first = letters.next().into_iter().flat_map(char::to_uppercase);
            let rest = letters.flat_map(char::to_lowercase);
            first.chain(rest).collect::<String>().into()
        }
        "find" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text.find(part).and_then(|at| text.get(..at));
            at.map_or(-1, |before| i64::try_from(before.chars().count()).unwrap_or(i64::MAX))
                .into()
        }
        "count" => {
            let (part,): (&str,) = from_args(args)?;
            text.matches(part).count().into()
        }
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

fn split(text: &str, separator: Option<&str>, most: Option<i64>) -> Value {
    let most = most.and_then(|most| usize::try_from(most).ok());
    let pieces: Vec<&str> = match (separator, most) {
        (Some(separator), Some(most)) => text.splitn(most.saturating_add(1), separator).collect(),
        (Some(separator), None) => text.split(separator).collect(),
        (None, _) => text.split_whitespace().collect(),
    };
    pieces.into_iter().map(Value::from).collect()
}

/// The filter `tojson`, in the spacing of Python's `json.dumps`, with its `indent`.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Sorting and escapes are not offered: transformers leaves both off.
    let _: (Option<bool>, Option<bool>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "`indent` of `tojson` is too wide",
        ));
    }
    let mut text = String::new();
    write_json(value, indent, 0, &mut text)?;
    Ok(text)
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, text: &mut String) -> Result<(), Error> {
    if depth >= JSON_DEPTH_MAX {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "value is nested too deeply for JSON",
        ));
    }
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&value.to_string()),
        ValueKind::Map => {
            text.push('{');
            let mut items = 0;
            for key in value.try_iter()? {
                separate(indent, depth, items, text);
                text.push_str(&quoted(&key.to_string()));
                text.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, text)?;
                items += 1;
            }
            close(indent, depth, items, '}', text);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            let mut items = 0;
            for item in value.try_iter()? {
                separate(indent, depth, items, text);
                write_json(&item, indent, depth + 1, text)?;
                items += 1;
            }
            close(indent, depth, items, ']', text);
        }
        _ => text.push_str(&quoted(&value.to_string())),
    }
    Ok(())
}

/// What stands before an item of a list or an object, of which `before` are written.
fn separate(indent: Option<usize>, depth: usize, before: usize, text: &mut String) {
    match indent {
        None if before == 0 => {}
        None => text.push_str(", "),
        Some(indent) => {
            text.push_str(if before == 0 { "\n" } else { ",\n" });
            text.extend(std::iter::repeat_n(' ', indent * (depth + 1)));
        }
    }
}

fn close(indent: Option<usize>, depth: usize, items: usize, end: char, text: &mut String) {
    if let (Some(indent), 1..) = (indent, items) {
        text.push('\n');
        text.extend(std::iter::repeat_n(' ', indent * depth));
    }
    text.push(end);
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
