//! Small GGUF files for tests.

use super::reader::{ARRAY_CODE, TEXT_CODE};

/// Writes small files for tests.
pub(in super::super) struct Builder {
    entries: u64,
    metadata: Vec<u8>,
    tensors: u64,
    table: Vec<u8>,
    data: Vec<u8>,
}

impl Builder {
    pub(in super::super) fn new() -> Self {
        Self {
            entries: 0,
            metadata: Vec::new(),
            tensors: 0,
            table: Vec::new(),
            data: Vec::new(),
        }
    }

    fn entry(mut self, key: &str, code: u32, value: &[u8]) -> Self {
        self.entries += 1;
        push_text(&mut self.metadata, key);
        self.metadata.extend(code.to_le_bytes());
        self.metadata.extend(value);
        self
    }

    pub(in super::super) fn text(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        push_text(&mut bytes, value);
        self.entry(key, TEXT_CODE, &bytes)
    }

    pub(in super::super) fn u32(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub(in super::super) fn f32(self, key: &str, value: f32) -> Self {
        self.entry(key, 6, &value.to_le_bytes())
    }

    pub(in super::super) fn flag(self, key: &str, value: bool) -> Self {
        self.entry(key, 7, &[u8::from(value)])
    }

    pub(in super::super) fn texts(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = Vec::new();
        for value in values {
            push_text(&mut bytes, value);
        }
        self.list(key, TEXT_CODE, values.len() as u64, &bytes)
    }

    pub(in super::super) fn floats(self, key: &str, values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.list(key, 6, values.len() as u64, &bytes)
    }

    pub(in super::super) fn whole_numbers(self, key: &str, values: &[i32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.list(key, 5, values.len() as u64, &bytes)
    }

    pub(super) fn list(self, key: &str, code: u32, count: u64, items: &[u8]) -> Self {
        let mut bytes = code.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(items);
        self.entry(key, ARRAY_CODE, &bytes)
    }

    /// `shape` is outermost first.
    pub(in super::super) fn tensor(self, name: &str, shape: &[u64], code: u32, bytes: &[u8]) -> Self {
        let offset = self.data.len().next_multiple_of(32);
        let mut builder = self.tensor_at(name, shape, code, offset as u64);
        builder.data.resize(offset, 0);
        builder.data.extend(bytes);
        builder
    }

    pub(super) fn tensor_at(mut self, name: &str, shape: &[u64], code: u32, offset: u64) -> Self {
        self.tensors += 1;
        push_text(&mut self.table, name);
        self.table.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            self.table.extend(size.to_le_bytes());
        }
        self.table.extend(code.to_le_bytes());
        self.table.extend(offset.to_le_bytes());
        self
    }

    pub(super) fn data(mut self, bytes: &[u8]) -> Self {
        self.data.extend(bytes);
        self
    }

    pub(in super::super) fn finish(self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(self.tensors.to_le_bytes());
        bytes.extend(self.entries.to_le_bytes());
        bytes.extend(self.metadata);
        bytes.extend(self.table);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(self.data);
        bytes
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
