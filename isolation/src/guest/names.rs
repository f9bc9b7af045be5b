//! Finds what has a name: an index of numbers by what their names hash to.

use super::cold::ColdRows;

/// Numbers by their names. Of a name only its hash is kept: who asks compares the names of what is
/// found.
#[derive(Debug, Default)]
pub struct NameIndex {
    /// Where each bucket begins in `numbers`, and where the last one ends.
    starts: ColdRows<4>,
    /// Numbers by bucket, and in one bucket in the order in which they were added.
    numbers: ColdRows<4>,
}

/// Collects names for an index.
#[derive(Debug, Default)]
pub struct NameIndexBuilder(Vec<(u32, u32)>);

impl NameIndexBuilder {
    /// `number` has this name.
    pub fn add(&mut self, name: &[u8], number: u32) {
        self.0.push((hash(name), number));
    }

    /// Puts the numbers in order: by counting, in time that grows with their number alone.
    pub fn finish(self) -> NameIndex {
        // Some two numbers a bucket.
        let buckets = (self.0.len() / 2).next_power_of_two();
        let bits = buckets.trailing_zeros();
        let mut ends = vec![0u32; buckets + 1];
        for (hash, _) in &self.0 {
            ends[bucket(*hash, bits) + 1] += 1;
        }
        for at in 1..ends.len() {
            ends[at] += ends[at - 1];
        }
        let starts = ends.iter().map(|at| at.to_le_bytes()).collect();
        let mut numbers = vec![[0; 4]; self.0.len()];
        for (hash, number) in &self.0 {
            let next = &mut ends[bucket(*hash, bits)];
            numbers[*next as usize] = number.to_le_bytes();
            *next += 1;
        }
        NameIndex {
            starts: ColdRows::new(starts),
            numbers: ColdRows::new(numbers),
        }
    }
}

impl NameIndex {
    /// Numbers that may have this name, in the order in which they were added.
    pub fn like(&self, name: &[u8]) -> impl Iterator<Item = u32> + use<'_> {
        let buckets = self.starts.rows().len().saturating_sub(1).max(1);
        let bucket = bucket(hash(name), buckets.trailing_zeros());
        let start = |bucket| {
            let row = self.starts.get(bucket);
            row.map_or(0, |row| u32::from_le_bytes(*row) as usize)
        };
        let numbers = self.numbers.rows().get(start(bucket)..start(bucket + 1));
        let numbers = numbers.unwrap_or_default().iter();
        numbers.map(|row| u32::from_le_bytes(*row))
    }

    /// Gives up the memory of what was looked at until now.
    pub fn cool(&self) {
        self.starts.cool();
        self.numbers.cool();
    }
}

/// The bucket of a hash, of so many to the power of two: its highest bits, which all others have
/// gone into.
fn bucket(hash: u32, bits: u32) -> usize {
    (u64::from(hash) << bits >> 32) as usize
}

/// Hashes eight bytes at a time, by multiplication. A guest that gives names which hash alike only
/// has them compared: it could as well give one name to all.
fn hash(name: &[u8]) -> u32 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let (words, rest) = name.as_chunks::<8>();
    let mut hash = name.len() as u64;
    for word in words {
        hash = (hash.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR);
    }
    let mut last = 0;
    for byte in rest {
        last = last << 8 | u64::from(*byte);
    }
    hash = (hash.rotate_left(5) ^ last).wrapping_mul(FACTOR);
    (hash ^ hash >> 29).wrapping_mul(FACTOR).wrapping_shr(32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_finds_its_numbers_in_order() {
        let mut index = NameIndexBuilder::default();
        let names: Vec<String> = (0..5000)
            .map(|number| format!("f{}", number % 4000))
            .collect();
        for (number, name) in names.iter().enumerate() {
            index.add(name.as_bytes(), number as u32);
        }
        let index = index.finish();
        let mut looked_at = 0;
        for name in &names[..4000] {
            let like: Vec<u32> = index.like(name.as_bytes()).collect();
            looked_at += like.len();
            assert!(like.is_sorted());
            let found = like
                .into_iter()
                .filter(|number| names[*number as usize] == *name);
            let all = (0..5000).filter(|number| names[*number as usize] == *name);
            assert!(found.eq(all));
        }
        // Names that share a bucket are few.
        assert!(looked_at < 5000 * 6, "{looked_at}");
    }

    #[test]
    fn an_index_of_nothing_finds_nothing() {
        assert_eq!(NameIndex::default().like(b"f").count(), 0);
        let index = NameIndexBuilder::default().finish();
        assert_eq!(index.like(b"f").count(), 0);
        let mut one = NameIndexBuilder::default();
        one.add(b"", 7);
        assert!(one.finish().like(b"").eq([7]));
    }
}
