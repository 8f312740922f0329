package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
)

// The size of one atomic batch of public events, and how far the tail of the public topic is read at a time.
const (
	maxBatchRecords = 500
	maxBatchBytes   = 768 << 10
	tailChunk       = 64
)

// Publish copies the partition's accepted events to the public topic, each once and in order, until ctx ends. What it
// writes is a function of the journal alone: a second publisher of the same partition can only repeat, never
// contradict, and consumers skip repetitions by the events' count. So that nothing is ever left out, one atomic batch
// is on its way at a time, and after any error the publisher goes back to the tail of what the log really holds.
func (j *Journal[S]) Publish(ctx context.Context, partition int32) {
	select {
	case <-j.started:
	case <-ctx.Done():
		return
	}
	p := j.partitions[partition]
	for delay := resendDelay; ctx.Err() == nil; delay = min(2*delay, time.Second) {
		began := time.Now()
		err := p.publish(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			delay = resendDelay
		}
		if errors.Is(err, errOtherJournal) {
			j.Logger.Error("nothing is published", "partition", partition, "err", err)
			pause(ctx, time.Minute)
			continue
		}
		j.Logger.Warn("publishing starts again from the tail of the public topic", "partition", partition, "err", err)
		pause(ctx, delay)
	}
}

func (p *partition[S]) publish(ctx context.Context) error {
	from, err := p.resume(ctx)
	if err != nil {
		return fmt.Errorf("find the place to resume at: %w", err)
	}
	return p.walk(ctx, from, func(records []Record) error {
		for len(records) > 0 {
			n := batchSize(records)
			if err := p.Public.AppendBatch(ctx, p.number, records[:n]); err != nil {
				return fmt.Errorf("publish: %w", err)
			}
			records = records[n:]
		}
		return nil
	})
}

// batchSize is how many of the records make the next batch: at least one.
func batchSize(records []Record) int {
	size := 0
	for i, r := range records {
		size += len(r.Value) + 512
		if i > 0 && (i == maxBatchRecords || size > maxBatchBytes) {
			return i
		}
	}
	return len(records)
}

// place is a point of the journal: everything up to it has been published.
type place struct {
	mark          // before the commit at offset
	published int // events of that commit
}

var errOtherJournal = errors.New("the public topic holds events, and the journal yields none of them: the journal was deleted " +
	"and made anew, or restored from elsewhere; make all topics and read models anew")

// resume finds the last record of the public topic that is ours: one that equals, byte for byte, what the journal
// yields. Records of others may lie around it.
func (p *partition[S]) resume(ctx context.Context) (place, error) {
	end, err := p.Public.End(ctx, p.number)
	if err != nil {
		return place{}, err
	}
	strange := false
	for size := int64(tailChunk); end > 0; size = min(2*size, 64*tailChunk) {
		from := max(0, end-size)
		var records []Record
		err := readRange(ctx, p.Public, p.number, from, end, func(rs []Record) error {
			records = append(records, rs...)
			return nil
		})
		if err != nil {
			return place{}, err
		}
		for _, r := range slices.Backward(records) {
			e, ok := ParseEvent(p.Topic, r)
			if !ok || e.Service != p.Service {
				continue
			}
			strange = true
			at, ok, err := p.published(ctx, e, r)
			if ok || err != nil {
				return at, err
			}
		}
		end = from
	}
	if strange {
		// Consumers have these events, so they would pass over ours, which have the same counts.
		return place{}, fmt.Errorf("%s partition %d: %w", p.Topic, p.number, errOtherJournal)
	}
	return place{}, nil
}

// published looks a public record up in the journal. It is false for one that the journal does not yield.
func (p *partition[S]) published(ctx context.Context, e domain.Recorded, r Record) (at place, ok bool, err error) {
	if end, err := p.Log.End(ctx, p.number); e.Offset < 0 || e.Offset >= end || err != nil {
		return place{}, false, err
	}
	if err := p.awaitPast(ctx, e.Offset+1); err != nil {
		return place{}, false, err
	}
	seq := p.markBefore(e.Offset)
	err = readRange(ctx, p.Log, p.number, seq.offset, e.Offset+1, func(records []Record) error {
		for _, j := range records {
			if !p.accepted(j.Offset) {
				continue
			}
			if j.Offset == e.Offset {
				public := p.publicRecords(j, seq.seq)
				ok = e.Index >= 0 && e.Index < len(public) && same(public[e.Index], r)
				at = place{mark{j.Offset, seq.seq}, e.Index + 1}
				return nil
			}
			h := headersOf(j)
			seq.seq += h.number(headerEvents, MaxEvents)
		}
		return nil
	})
	return at, ok, err
}

// walk hands on the public records of everything that is accepted after the place, for ever.
func (p *partition[S]) walk(ctx context.Context, from place, f func([]Record) error) error {
	seq, skip := from.seq, from.published
	return p.Log.Read(ctx, p.number, from.offset, func(b Batch) error {
		var out []Record
		folded := p.folded()
		for _, r := range b.Records {
			if r.Offset >= folded { // the fold may have halted here: what lies before must go out
				if err := f(out); err != nil {
					return err
				}
				out = nil
				if err := p.awaitPast(ctx, r.Offset+1); err != nil {
					return err
				}
				folded = p.folded()
			}
			if !p.accepted(r.Offset) {
				continue
			}
			public := p.publicRecords(r, seq)
			seq += int64(len(public))
			out = append(out, public[skip:]...)
			skip = 0
		}
		return f(out)
	})
}

// publicRecords is what an accepted commit makes public, when `seq` events were accepted before it. It depends on
// nothing but the journal's record, so every publisher of any version makes the same.
func (p *partition[S]) publicRecords(r Record, seq int64) []Record {
	// The record was accepted, so its headers are whole.
	h := headersOf(r)
	count := int(h.number(headerEvents, MaxEvents))
	version := h.number(headerVersion, maxInt64)
	trace := ""
	if slices.ContainsFunc(r.Headers, func(h Header) bool { return h.Key == headerTrace }) {
		trace = string(h.one(headerTrace))
	}
	f, err := decodeFrame(r.Value, count)
	if err != nil {
		f.events = make([]frameEvent, count)
		commit := h.uuid(headerCommit)
		for i := range f.events {
			f.events[i] = frameEvent{
				id:   uuid.NewSHA1(commit, fmt.Appendf(nil, "%d", i)),
				name: Unreadable,
				time: r.Time.UTC().Truncate(time.Millisecond),
			}
		}
	}
	out := make([]Record, count)
	for i, e := range f.events {
		out[i] = NewEventRecord(domain.Recorded{
			ID: e.id, Name: e.name, Service: p.Service, Stream: string(r.Key), Version: version + int64(i) + 1,
			Time: e.time, Position: p.position(seq + int64(i) + 1), Offset: r.Offset, Index: i, Cause: e.cause,
			Trace: trace, Data: e.data,
		})
		out[i].Partition = r.Partition
	}
	return out
}

// same says whether two records hold the same bytes, wherever they lie.
func same(a, b Record) bool {
	return a.Partition == b.Partition && bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) &&
		slices.EqualFunc(a.Headers, b.Headers, func(a, b Header) bool {
			return a.Key == b.Key && bytes.Equal(a.Value, b.Value)
		})
}

var errDone = errors.New("done")

// readRange reads the records from `from` up to but not including `to`, which must be at most the log's end.
func readRange(ctx context.Context, r Reader, partition int32, from, to int64, f func([]Record) error) error {
	if from >= to {
		return nil
	}
	err := r.Read(ctx, partition, from, func(b Batch) error {
		records := b.Records
		if n := slices.IndexFunc(records, func(r Record) bool { return r.Offset >= to }); n >= 0 {
			records = records[:n]
		}
		if err := f(records); err != nil {
			return err
		}
		if b.Next >= to {
			return errDone
		}
		return nil
	})
	if errors.Is(err, errDone) {
		return nil
	}
	return err
}
