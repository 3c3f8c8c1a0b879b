//! Damage to files, one kind after another: whatever was acknowledged and is not what was written
//! is reported, and what was never acknowledged is never taken for something that was.

use super::compress::{compress, replace};
use super::error::StoreError;
use super::format::{
    FRAME_HEADER, FrameHeader, SEGMENT_HEADER, compressed_base, crc32c, segment_base, segment_name,
};
use super::log::Limits;
use super::recovery::read_header;
use super::salvage::{Salvage, Survey};
use super::scan::Scan;
use super::sim::{Random, SimDisk};
use super::storage::Storage;
use super::verify::verify;
use super::workload::{Record, Workload, Wrong, from_environment, open_log, read};
use std::ops::Range;
use std::sync::Arc;

/// Flipped bits for each log that is salvaged.
const SALVAGE_ONE_IN: u64 = 10;

const LIMITS: Limits = Limits { segment_bytes: SEGMENT_HEADER as u64 + 900, max_bytes: None };

/// Returns the disk of a log of several segments, the records in it, and the log if it is still open.
/// Everything is acknowledged, and a marker says so.
fn written(seed: u64, is_closed: bool) -> Result<(SimDisk, Vec<Record>), StoreError> {
    let disk = SimDisk::new(seed);
    let (log, _) = open_log(&disk, LIMITS)?;
    let mut workload = Workload::new(disk.clone(), log, Vec::new(), seed);
    let has_four = |workload: &Workload| {
        let log = workload.log();
        log.segments().get(3).is_some_and(|fourth| fourth.base < log.next())
    };
    while !has_four(&workload) {
        workload.append(3)?;
        workload.object()?;
        workload.log().sync()?;
    }
    match is_closed {
        true => workload.log().seal()?,
        false => {
            assert!(workload.log().mark()?, "nothing says that the last commit is acknowledged");
            workload.log().sync()?;
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

/// Returns the records of a frame and whether it has some.
fn records_at(contents: &[u8], offset: usize) -> (Range<u64>, bool) {
    let header = contents.get(offset..offset + FRAME_HEADER).and_then(FrameHeader::decode);
    header.map_or((0..0, false), |header| {
        let count = u64::from(header.count);
        (header.sequence..header.sequence + count, count > 0)
    })
}

/// Returns the records that may be lost with some bytes of a segment: those of the frame, or all of the
/// segment where the frame has names.
fn lost_with(disk: &SimDisk, name: &str, bytes: Range<usize>) -> Range<u64> {
    let (contents, offsets) = (disk.contents(name).unwrap_or_default(), frames(disk, name));
    let damaged: Vec<usize> = offsets
        .windows(2)
        .filter(|frame| frame[0] < bytes.end && bytes.start < frame[1])
        .map(|frame| frame[0])
        .collect();
    let of = |offset: &usize| records_at(&contents, *offset);
    match damaged.first().map(of).zip(damaged.last().map(of)) {
        None => 0..0,
        Some(((first, true), (last, true))) => first.start..last.end,
        Some(_) => records_in(disk, name),
    }
}

/// Returns the records of a segment.
fn records_in(disk: &SimDisk, name: &str) -> Range<u64> {
    let (contents, offsets) = (disk.contents(name).unwrap_or_default(), frames(disk, name));
    let ranges: Vec<_> = offsets.iter().map(|offset| records_at(&contents, *offset).0).collect();
    let start = segment_base(name).unwrap_or_default();
    start..ranges.iter().map(|range| range.end).max().unwrap_or(start)
}

/// Surveys a log, and compares what that says of damage with what verifying it says.
fn surveyed(disk: &SimDisk, what: &str) -> Result<(Survey, Salvage), Wrong> {
    let survey = Survey::of(disk);
    let surveyed = survey.and_then(|survey| Ok((survey.salvage(disk)?, survey)));
    let (salvage, survey) = surveyed.map_err(|error| format!("{what}: surveying gave {error}"))?;
    let verified = match verify(disk) {
        Ok(found) => Ok(found),
        Err(error @ StoreError::Corrupt { .. }) => Err(error),
        // It looks no further.
        Err(StoreError::Version { .. }) => return Ok((survey, salvage)),
        Err(error) => return Err(format!("{what}: verifying gave {error}")),
    };
    match verified.is_err() == salvage.is_damaged {
        true => Ok((survey, salvage)),
        false => Err(format!("{what}: {verified:?}, but {salvage:?}")),
    }
}

/// Salvages a damaged log: what is whole is there under its own sequence, what is not is a gap, and
/// nothing is lost but what may be.
fn is_salvaged(
    disk: &SimDisk,
    records: &[Record],
    may_be_lost: &Range<u64>,
    what: &str,
) -> Result<(), Wrong> {
    let wrong = |error: StoreError| format!("{what}: salvaging it gave {error}");
    let contents = |disk: &SimDisk| -> Vec<_> {
        let names = disk.names().unwrap_or_default();
        names.into_iter().map(|name| (disk.contents(&name), name)).collect()
    };
    let before = contents(disk);
    let (survey, salvage) = surveyed(disk, what)?;
    if salvage.next_sequence > records.len() as u64 {
        return Err(format!("{what}: there are {} records, not {salvage:?}", records.len()));
    }
    let to = SimDisk::new(records.len() as u64);
    survey.write(disk, Arc::new(to.clone()), LIMITS).map_err(wrong)?;
    if contents(disk) != before {
        return Err(format!("{what}: salvaging has changed it"));
    }
    let (first, found) = read(&to).map_err(wrong)?;
    let (next, lost) = (salvage.next_sequence, &salvage.lost);
    if (first, first + found.len() as u64) != (salvage.oldest_sequence, next) {
        return Err(format!("{what}: {first} and {} records are not {salvage:?}", found.len()));
    }
    let mut kept = 0;
    for (sequence, record) in (0..).zip(records) {
        let is_lost = lost.iter().any(|lost| lost.contains(&sequence)) || sequence >= next;
        let there = sequence.checked_sub(first).and_then(|place| found.get(place as usize));
        let is_right = match there {
            Some(there) if is_lost => *there == Record::Gap(1),
            Some(there) => there == record,
            None => is_lost,
        };
        if !is_right || is_lost && !may_be_lost.contains(&sequence) {
            return Err(format!("{what}: {sequence} is {there:?} of {record:?} after {salvage:?}"));
        }
        kept += u64::from(!is_lost);
    }
    match kept == salvage.kept {
        true => Ok(()),
        false => Err(format!("{what}: {kept} of {} records, {salvage:?}", records.len())),
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
            let what = format!("bit {bit} of {name}, closed: {is_closed}");
            is_reported(&damaged, &records, &what)?;
            if flipped % SALVAGE_ONE_IN == 0 {
                let may_be_lost = lost_with(&disk, name, bit / 8..bit / 8 + 1);
                is_salvaged(&damaged, &records, &may_be_lost, &what)?;
            }
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
        surveyed(&damaged, &what)?;
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

/// Damages logs of any kind anywhere, and returns how many of so many are damaged in what was
/// acknowledged.
pub(super) fn surveys(seed: u64, wanted: u64) -> Result<u64, Wrong> {
    const OF_EACH: u64 = 50;
    let mut random = Random(seed);
    let mut damaged = 0;
    for number in 0..wanted {
        let failed = |error: StoreError| format!("log {number}: {error}");
        let disk = SimDisk::new(random.next());
        let (log, _) = open_log(&disk, LIMITS).map_err(failed)?;
        let mut workload = Workload::new(disk.clone(), log, Vec::new(), random.next());
        for _ in 0..random.below(60) {
            workload.step().map_err(failed)?;
        }
        let mut names = disk.names().unwrap_or_default();
        names.retain(|name| segment_base(name).or_else(|| compressed_base(name)).is_some());
        for _ in 0..OF_EACH.min(OF_EACH * names.len() as u64) {
            let mut any = || &names[random.below(names.len() as u64) as usize];
            let (name, other) = (any(), any());
            let changed = disk.settled();
            let mut bytes = changed.contents(name).unwrap_or_default();
            let mut place = || random.below(bytes.len() as u64) as usize;
            let (from, end) = (place(), place());
            let what = random.below(8);
            match what {
                0 => _ = changed.remove(name),
                1 => changed.put(name, changed.contents(other).unwrap_or_default()),
                2 => bytes.truncate(from),
                3 => bytes[from..].fill(0),
                4 => bytes[from.min(end)..from.max(end)].fill(0),
                _ => bytes[from] ^= 1 << random.below(8),
            }
            if what > 1 {
                changed.put(name, bytes);
            }
            let what = format!("log {number}, change {what} of {name} from {from} to {end}");
            damaged += u64::from(surveyed(&changed, &what)?.1.is_damaged);
        }
    }
    Ok(damaged)
}

/// Loses, repeats, exchanges and overwrites parts of files.
pub(super) fn parts(seed: u64) -> Result<u64, Wrong> {
    let mut tried = 0;
    for is_closed in [false, true] {
        let (disk, records) = written(seed, is_closed).map_err(|error| error.to_string())?;
        let names = segments(&disk);
        let mut look = |what: String, may_be_lost: Range<u64>, change: &dyn Fn(&SimDisk)| {
            let damaged = disk.settled();
            change(&damaged);
            tried += 1;
            let what = format!("{what}, closed: {is_closed}");
            is_reported(&damaged, &records, &what)?;
            is_salvaged(&damaged, &records, &may_be_lost, &what)
        };
        let contents = |name: &str| disk.contents(name).unwrap_or_default();
        for (place, name) in names.iter().enumerate() {
            let is_last = place + 1 == names.len();
            let (offsets, own) = (frames(&disk, name), records_in(&disk, name));
            if place > 0 && !is_last {
                look(format!("{name} is missing"), own.clone(), &|disk| _ = disk.remove(name))?;
            }
            for (other_place, other) in names.iter().enumerate().filter(|(p, _)| *p != place) {
                look(format!("{name} is {other}"), own.clone(), &|disk| {
                    disk.put(name, contents(other));
                })?;
                if other_place > place {
                    look(format!("{name} and {other} are exchanged"), 0..0, &|disk| {
                        disk.put(name, contents(other));
                        disk.put(other, contents(name));
                    })?;
                }
            }
            let known = offsets.len() - 1 - usize::from(is_last);
            for frame in 0..known {
                let (from, end) = (offsets[frame], offsets[frame + 1]);
                let lost = lost_with(&disk, name, from..end);
                look(format!("{name} ends at {from}"), lost.clone(), &|disk| {
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
                look(format!("frame {frame} of {name} is missing"), lost, &|disk| {
                    let mut bytes = contents(name);
                    bytes.drain(from..end);
                    disk.put(name, bytes);
                })?;
                // Nothing counts behind a seal, and no record is lost behind the last one.
                if !is_last && end < contents(name).len() {
                    look(format!("frame {frame} of {name} is there twice"), 0..0, &|disk| {
                        let mut bytes = contents(name);
                        let copy = bytes[from..end].to_vec();
                        bytes.splice(end..end, copy);
                        disk.put(name, bytes);
                    })?;
                }
            }
            look(format!("4 KiB of {name} are zeros"), 0..0, &|disk| {
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
        is_salvaged(&damaged, &records, &(0..0), &format!("frame {number} behind the end"))?;
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
    let crc = crc32c(&frame[4..FRAME_HEADER]);
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
        workload.log().seal()?;
        workload.random = Random(salt);
        workload.append(3)?;
        workload.log().seal()?;
        workload.append(3)?;
        workload.log().seal()?;
        Ok((disk.settled(), workload.records))
    };
    let ((disk, records), (other, _)) = (history(1).map_err(wrong)?, history(2).map_err(wrong)?);
    let name = segment_name(3);
    let Some(stale) = other.contents(&name) else { return Err("there is no segment".to_owned()) };
    disk.put(&name, stale);
    let what = "a segment of another history";
    is_reported(&disk, &records, what)?;
    is_salvaged(&disk, &records, &(3..6), what)
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
fn surveying_a_log_says_of_damage_what_verifying_it_says() {
    let (seed, wanted) = (from_environment("SEED", 1), from_environment("FLIPS", 2_000) / 20);
    match surveys(seed, wanted) {
        Ok(damaged) => println!("{damaged} damaged logs"),
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
fn a_log_whose_first_segment_is_missing_is_not_opened() {
    for is_closed in [false, true] {
        let (disk, _) = written(1, is_closed).expect("there is room");
        disk.remove(&segment_name(0)).expect("it is there");
        let Err(error) = open_log(&disk, LIMITS) else { panic!("closed: {is_closed}") };
        let is_first = |error: &StoreError| matches!(error, StoreError::Corrupt { segment, .. } if *segment == segment_name(0));
        assert!(is_first(&error), "{error}, closed: {is_closed}");
    }
}

#[test]
fn what_stands_behind_a_header_that_nobody_can_read_is_cut_and_counted() {
    let (log, records) = written(1, true).expect("there is room");
    let old = log.contents(&segment_name(0)).expect("it is there").split_off(SEGMENT_HEADER);
    let end = records.len() as u64;
    let damaged = vec![0xa5; SEGMENT_HEADER + 700];
    let with = |frames: &[u8]| [&[0; SEGMENT_HEADER], frames].concat();
    // A file that was a segment before may have been wiped when the power failed: its old frames are
    // nothing that was written now.
    let cases = [
        (SimDisk::new(2), 0, damaged.clone(), damaged.len()),
        (SimDisk::new(2), 0, with(&[]), 0),
        (log.settled(), end, damaged.clone(), damaged.len()),
        (log.settled(), end, with(&damaged), SEGMENT_HEADER + damaged.len()),
        (log.settled(), end, with(&old), 0),
        (log.settled(), end, with(&[&*old, &damaged].concat()), 0),
    ];
    for (case, (disk, next, contents, torn)) in cases.into_iter().enumerate() {
        disk.put(&segment_name(next), contents);
        let verified = verify(&disk).expect("nothing that was acknowledged is damaged");
        assert_eq!((verified.next_sequence, verified.torn_bytes), (next, torn as u64), "{case}");
        let (_, recovery) = open_log(&disk, LIMITS).expect("nothing that counts is damaged");
        assert_eq!((recovery.next_sequence, recovery.cut_bytes), (next, torn as u64), "{case}");
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

#[test]
fn a_damaged_log_that_is_salvaged_ends_where_nothing_acknowledged_is_missing() {
    let disk = SimDisk::new(1);
    let (log, _) = open_log(&disk, LIMITS).expect("it is new");
    let mut workload = Workload::new(disk.clone(), log, Vec::new(), 1);
    workload.append(3).and_then(|()| workload.log().sync()).expect("there is room");
    assert!(workload.log().mark().expect("there is room"));
    workload.log().sync().expect("nothing fails");
    for _ in 0..2 {
        workload.append(2).and_then(|()| workload.log().flush()).expect("there is room");
    }
    let damaged = disk.settled();
    let name = segment_name(0);
    let mut bytes = damaged.contents(&name).expect("it is there");
    let is_at = |sequence, offset: &usize| records_at(&bytes, *offset) == (sequence, true);
    let offsets = frames(&damaged, &name);
    let acknowledged = offsets.iter().find(|offset| is_at(0..3, offset)).expect("it is there") + 50;
    let torn = offsets.iter().find(|offset| is_at(3..5, offset)).expect("it is there") + 50;
    assert!(offsets.iter().any(|offset| is_at(5..7, offset)));
    bytes[acknowledged] ^= 1;
    bytes[torn] ^= 1;
    damaged.put(&name, bytes);
    is_salvaged(&damaged, &workload.records[..3], &(0..3), "torn").expect("the rest is cut");
}
