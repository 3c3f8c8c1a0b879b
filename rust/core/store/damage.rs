//! Damage to files, one kind after another: whatever was acknowledged and is not what was written
//! is reported, and what was never acknowledged is never taken for something that was.

use super::compressed::{compress, replace};
use super::crash::{Record, Workload, Wrong, from_environment, open_log, read};
use super::error::StoreError;
use super::format::{FRAME_HEADER, SEGMENT_HEADER, segment_base, segment_name};
use super::log::Limits;
use super::recovery::read_header;
use super::scan::Scan;
use super::sim::{Random, SimDisk};
use super::storage::Storage;
use super::verify::verify;

const LIMITS: Limits = Limits { segment_bytes: SEGMENT_HEADER as u64 + 900, max_bytes: None };

/// Returns the disk of a log of several segments, the records in it, and the log if it is still open.
/// Everything is acknowledged, and a marker says so.
fn written(seed: u64, is_closed: bool) -> Result<(SimDisk, Vec<Record>), StoreError> {
    let disk = SimDisk::new(seed);
    let (log, _) = open_log(&disk, LIMITS)?;
    let mut workload = Workload::new(disk.clone(), log, Vec::new(), seed);
    while workload.log.segments().len() < 4
        || workload.log.next() == workload.log.segments()[3].base
    {
        workload.append(3)?;
        workload.object()?;
        workload.log.sync()?;
    }
    match is_closed {
        true => workload.log.seal()?,
        false => {
            assert!(workload.log.mark()?, "nothing says that the last commit is acknowledged");
            workload.log.sync()?;
        }
    }
    Ok((disk.settled(), workload.records))
}

fn segments(disk: &SimDisk) -> Vec<String> {
    let mut names = disk.names().unwrap_or_default();
    names.retain(|name| name.ends_with(".elog"));
    names
}

/// Returns the offsets of the frames of a segment, and of its end.
fn frames(disk: &SimDisk, name: &str) -> Vec<usize> {
    let open = || disk.open(name, false);
    let (Ok(file), Ok(again)) = (open(), open()) else { return Vec::new() };
    let Ok((_, Some(header))) = read_header(&file, name) else { return Vec::new() };
    let mut scan = Scan::new(again, header.salt, SEGMENT_HEADER as u64, header.base);
    let mut offsets = vec![SEGMENT_HEADER];
    while let Ok(Some(_)) = scan.next() {
        offsets.push(scan.offset() as usize);
    }
    offsets
}

/// Looks at a log in which something acknowledged is not what was written.
fn is_reported(disk: &SimDisk, records: &[Record], what: &str) -> Result<(), Wrong> {
    match verify(disk) {
        Err(StoreError::Corrupt { .. } | StoreError::Version { .. }) => {}
        Err(error) => return Err(format!("{what}: reported as {error}")),
        Ok(found) => return Err(format!("{what}: taken for sound, {found:?}")),
    }
    // Whoever opens it for writing is told so too, or has not touched it and reads what is whole.
    match open_log(disk, LIMITS) {
        Err(StoreError::Corrupt { .. } | StoreError::Version { .. }) => Ok(()),
        Err(error) => Err(format!("{what}: opening it gave {error}")),
        Ok((log, _)) if log.next() == records.len() as u64 && verify(disk).is_err() => Ok(()),
        Ok((log, _)) => Err(format!("{what}: opened with {} of {}", log.next(), records.len())),
    }
}

/// Flips bits, each in a copy of the log: all of some segments, and further ones by chance.
pub(super) fn flips(seed: u64, wanted: u64) -> Result<u64, Wrong> {
    let mut random = Random(seed);
    let mut flipped = 0;
    while flipped < wanted {
        let is_closed = random.once_in(2);
        let (disk, records) = written(random.next(), is_closed).map_err(|e| e.to_string())?;
        let names = segments(&disk);
        for _ in 0..2_000 {
            let name = &names[random.below(names.len() as u64) as usize];
            let offsets = frames(&disk, name);
            // The marker or the seal that says that the rest is acknowledged is not said to be by
            // anything itself.
            let is_last = Some(name) == names.last();
            let end = offsets[offsets.len() - 1 - usize::from(is_last)];
            let bit = random.below(8 * end as u64) as usize;
            let mut contents = disk.contents(name).unwrap_or_default();
            contents[bit / 8] ^= 1 << (bit % 8);
            let damaged = disk.settled();
            damaged.put(name, contents);
            is_reported(&damaged, &records, &format!("bit {bit} of {name}, closed: {is_closed}"))?;
            flipped += 1;
        }
    }
    Ok(flipped)
}

/// Flips bits of compressed segments: what is read then is reported or what was written.
pub(super) fn compressed_flips(seed: u64, wanted: u64) -> Result<(), Wrong> {
    let mut random = Random(seed);
    let failed = |error: StoreError| error.to_string();
    let (disk, records) = written(seed, true).map_err(failed)?;
    let names = segments(&disk);
    for base in names.iter().filter_map(|name| segment_base(name)) {
        compress(&disk, base).map_err(failed)?;
        replace(&disk, base).map_err(|error| format!("{error:?}"))?;
    }
    let (_, read_again) = read(&disk).map_err(failed)?;
    if read_again != records || !segments(&disk).is_empty() {
        return Err("compressed, it is another log".to_owned());
    }
    let names = disk.names().unwrap_or_default();
    for flipped in 0..wanted {
        let name = &names[random.below(names.len() as u64) as usize];
        let mut contents = disk.contents(name).unwrap_or_default();
        let bit = random.below(8 * contents.len() as u64) as usize;
        contents[bit / 8] ^= 1 << (bit % 8);
        let damaged = disk.settled();
        damaged.put(name, contents);
        let what = format!("bit {bit} of {name}, the {flipped}th");
        match verify(&damaged) {
            Err(_) => is_reported(&damaged, &records, &what)?,
            Ok(_) => match read(&damaged) {
                Ok((_, found)) if found == records => {}
                Ok(_) => return Err(format!("{what}: other records are read")),
                Err(error) => return Err(format!("{what}: not verified, but {error}")),
            },
        }
    }
    Ok(())
}

/// Loses, repeats, exchanges and overwrites parts of files.
pub(super) fn parts(seed: u64) -> Result<u64, Wrong> {
    let mut tried = 0;
    for is_closed in [false, true] {
        let (disk, records) = written(seed, is_closed).map_err(|error| error.to_string())?;
        let names = segments(&disk);
        let mut look = |what: String, change: &dyn Fn(&SimDisk)| {
            let damaged = disk.settled();
            change(&damaged);
            tried += 1;
            is_reported(&damaged, &records, &format!("{what}, closed: {is_closed}"))
        };
        let contents = |name: &str| disk.contents(name).unwrap_or_default();
        for (place, name) in names.iter().enumerate() {
            let is_last = place + 1 == names.len();
            let offsets = frames(&disk, name);
            if place > 0 && !is_last {
                look(format!("{name} is missing"), &|disk| _ = disk.remove(name))?;
            }
            for (other_place, other) in names.iter().enumerate().filter(|(p, _)| *p != place) {
                look(format!("{name} is {other}"), &|disk| disk.put(name, contents(other)))?;
                if other_place > place {
                    look(format!("{name} and {other} are exchanged"), &|disk| {
                        disk.put(name, contents(other));
                        disk.put(other, contents(name));
                    })?;
                }
            }
            let known = offsets.len() - 1 - usize::from(is_last);
            for frame in 0..known {
                let (from, end) = (offsets[frame], offsets[frame + 1]);
                look(format!("{name} ends at {from}"), &|disk| {
                    // What was acknowledged later is known from the segments behind.
                    let mut bytes = contents(name);
                    let rest = bytes.split_off(from);
                    bytes.extend(rest.iter().map(|_| 0).take(end - from));
                    bytes.extend(&rest[end - from..]);
                    disk.put(name, bytes);
                })?;
                // What moves all that follows is no fault of a disk: a seal finds it.
                if is_last && !is_closed {
                    continue;
                }
                look(format!("frame {frame} of {name} is missing"), &|disk| {
                    let mut bytes = contents(name);
                    bytes.drain(from..end);
                    disk.put(name, bytes);
                })?;
                // Nothing counts behind a seal, and no record is lost behind the last one.
                if !is_last && end < contents(name).len() {
                    look(format!("frame {frame} of {name} is there twice"), &|disk| {
                        let mut bytes = contents(name);
                        let copy = bytes[from..end].to_vec();
                        bytes.splice(end..end, copy);
                        disk.put(name, bytes);
                    })?;
                }
            }
            look(format!("4 KiB of {name} are zeros"), &|disk| {
                let mut bytes = contents(name);
                bytes[..SEGMENT_HEADER].fill(0);
                disk.put(name, bytes);
            })?;
        }
    }
    Ok(tried)
}

/// Looks at what is behind the end of a log that was not closed: whatever stands there, none of it
/// was acknowledged.
pub(super) fn behind(seed: u64) -> Result<(), Wrong> {
    let wrong = |error: StoreError| format!("false alarm: {error}");
    let (disk, records) = written(seed, false).map_err(wrong)?;
    let (other, _) = written(seed + 1, false).map_err(wrong)?;
    let names = segments(&disk);
    let (Some(name), Some(other_name)) = (names.last(), segments(&other).pop()) else {
        return Err("there is no segment".to_owned());
    };
    let contents = disk.contents(name).unwrap_or_default();
    let end = frames(&disk, name).pop().unwrap_or_default();
    let stale = other.contents(&other_name).unwrap_or_default();
    let offsets = frames(&other, &other_name);
    // Frames of an earlier life of the file that would fit in sequence, and one that is there twice.
    let mut fitting: Vec<Vec<u8>> = offsets
        .windows(2)
        .map(|frame| {
            let mut bytes = stale[frame[0]..frame[1]].to_vec();
            with_sequence(&mut bytes, records.len() as u64);
            bytes
        })
        .collect();
    let own = frames(&disk, name);
    fitting.extend(own.windows(2).map(|frame| contents[frame[0]..frame[1]].to_vec()));
    for (number, frame) in fitting.into_iter().enumerate() {
        let mut bytes = contents.clone();
        bytes.truncate(end);
        bytes.extend(frame);
        let damaged = disk.settled();
        damaged.put(name, bytes);
        open_log(&damaged, LIMITS).map_err(|error| format!("frame {number}: {error}"))?;
        let (_, found) = read(&damaged).map_err(wrong)?;
        if found != records {
            return Err(format!("frame {number} was taken for one of the log"));
        }
    }
    Ok(())
}

/// Gives a frame another sequence, and the watermark of nothing, with the right checksum.
fn with_sequence(frame: &mut [u8], sequence: u64) {
    frame[8..16].copy_from_slice(&sequence.to_le_bytes());
    frame[16..24].fill(0);
    let crc = crc32c::crc32c(&frame[4..FRAME_HEADER]);
    frame[..4].copy_from_slice(&crc.to_le_bytes());
}

/// Puts a segment of a history that was given up into the place of the one that took its place.
pub(super) fn histories(seed: u64) -> Result<(), Wrong> {
    let wrong = |error: StoreError| format!("false alarm: {error}");
    let history = |salt: u64| -> Result<(SimDisk, Vec<Record>), StoreError> {
        let disk = SimDisk::default();
        let (log, _) = open_log(&disk, LIMITS)?;
        let mut workload = Workload::new(disk.clone(), log, Vec::new(), seed);
        workload.append(3)?;
        workload.log.seal()?;
        workload.random = Random(salt);
        workload.append(3)?;
        workload.log.seal()?;
        workload.append(3)?;
        workload.log.seal()?;
        Ok((disk.settled(), workload.records))
    };
    let ((disk, records), (other, _)) = (history(1).map_err(wrong)?, history(2).map_err(wrong)?);
    let name = segment_name(3);
    let Some(stale) = other.contents(&name) else { return Err("there is no segment".to_owned()) };
    disk.put(&name, stale);
    is_reported(&disk, &records, "a segment of another history")
}

#[test]
fn each_bit_that_flips_below_the_watermark_is_reported() {
    let (seed, wanted) = (from_environment("SEED", 1), from_environment("FLIPS", 2_000));
    match flips(seed, wanted) {
        Ok(flipped) => println!("{flipped} bits flipped"),
        Err(wrong) => panic!("SEED={seed}: {wrong}"),
    }
}

#[test]
fn a_bit_that_flips_in_a_compressed_segment_is_reported_or_changes_nothing() {
    let (seed, wanted) = (from_environment("SEED", 1), from_environment("FLIPS", 2_000));
    if let Err(wrong) = compressed_flips(seed, wanted / 4) {
        panic!("SEED={seed}: {wrong}");
    }
}

#[test]
fn whatever_part_of_a_file_is_lost_repeated_or_exchanged_is_reported() {
    match parts(1) {
        Ok(tried) => println!("{tried} damaged logs"),
        Err(wrong) => panic!("{wrong}"),
    }
}

#[test]
fn nothing_behind_the_end_is_taken_for_a_part_of_the_log() {
    if let Err(wrong) = behind(1) {
        panic!("{wrong}");
    }
}

#[test]
fn a_segment_of_a_history_that_was_given_up_is_reported() {
    if let Err(wrong) = histories(1) {
        panic!("{wrong}");
    }
}
