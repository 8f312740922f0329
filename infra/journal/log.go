package journal

import (
	"context"
	"errors"
	"time"
)

// Header is one header of a record. A name may occur more than once.
type Header struct {
	Key   string
	Value []byte
}

// Record is one record of a partitioned log, with the place it was read from. Readers must not change its bytes.
type Record struct {
	Partition int32
	Offset    int64     // set by the log, ignored by Append
	Time      time.Time // set by the log or its client, ignored by Append
	Key       []byte
	Value     []byte
	Headers   []Header
}

// Batch is what one read of a partition brought: records in offset order, perhaps none, and Next, the fetch
// position after it. Next may be beyond the last record's offset + 1, because a log has offsets without a record
// (control records, compacted ones); only Next says how far the reader has got.
type Batch struct {
	Records []Record
	Next    int64
}

// Reader reads one topic.
type Reader interface {
	// Read hands every record of the partition from offset `from` on to f, in offset order and each once, in the
	// caller's goroutine, and follows the log as it grows, until ctx ends or f returns an error; it returns that
	// error. Passing faults (a broker that is away, a leader that moves) are retried inside, for ever. A log that
	// no longer has `from` is an error that says so, never a silent jump.
	Read(ctx context.Context, partition int32, from int64, f func(Batch) error) error

	// End is the offset that the partition's next record will get, asked of the leader after the call began.
	End(ctx context.Context, partition int32) (int64, error)
}

// Log is a service's journal topic: read by everyone, appended to one record at a time.
type Log interface {
	Reader

	// Append publishes one record to r.Partition. Nil means that the record is in the log, durably. An error
	// means that the outcome is unknown: the record may be in the log, come into it later, or twice. ErrRefused
	// (see errors.Is) means that trying the same record again is of no use (too large, not authorised); even then
	// an earlier try of it may have got in. The end of ctx need not end a call that is under way.
	Append(ctx context.Context, r Record) error
}

// ErrRefused marks an append that will never succeed, however often it is tried: the record is too large, or this
// program may not write to the topic.
var ErrRefused = errors.New("refused by the log")

// PublicLog is a service's public topic: read by everyone, appended to by the publisher alone.
type PublicLog interface {
	Reader

	// AppendBatch publishes the records to one partition as one atomic record batch: all of them, in order and
	// next to each other, or none. Nil means that they are in the log, durably. An error means that the outcome
	// is unknown; the records may come into the log later, or twice, but never in part.
	AppendBatch(ctx context.Context, partition int32, records []Record) error
}
