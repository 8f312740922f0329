package journal

import (
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"wharf/domain"
)

func someFrame() frame {
	return frame{
		events: []frameEvent{
			{id: uuid.MustParse("01980000-0000-7000-8000-000000000001"), name: "tally.marked.v1", time: time.Unix(1, 0).UTC(), data: []byte(`{"By":1}`)},
			{id: uuid.MustParse("01980000-0000-7000-8000-000000000002"), name: "x", time: time.Unix(2, 5000).UTC(), data: []byte("{}"),
				cause: domain.Position{Topic: "others.events", Partition: 3, Seq: 7}, group: "policies"},
		},
		outcomes: []outcome{{key: digestOf("k"), request: digestOf("r"), events: 1, note: 2, refusal: domain.Refuse("full", "it is full")}},
	}
}

// FuzzFrame: whatever is decoded is whole, and says the same when it is written again, but for what was left out.
func FuzzFrame(f *testing.F) {
	whole := someFrame()
	f.Add(whole.encode(), uint16(2))
	f.Add(whole.encode()[:40], uint16(2))
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, value []byte, count uint16) {
		events := int(count)
		given, err := decodeFrame(value, events)
		if err != nil {
			return
		}
		if len(given.events) != events {
			t.Fatalf("%d events, want %d", len(given.events), events)
		}
		first, err := decodeFrame(given.encode(), events)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeFrame(first.encode(), events)
		if diff := cmp.Diff(first, again, cmp.AllowUnexported(frame{}, frameEvent{}, outcome{})); err != nil || diff != "" {
			t.Fatal(err, diff)
		}
	})
}

// FuzzParseEvent: whatever is taken for an event says the same when it is written again.
func FuzzParseEvent(f *testing.F) {
	r := NewEventRecord(domain.Recorded{ID: uuid.MustParse("01980000-0000-7000-8000-000000000001"), Name: "tally.marked.v1", Service: "tallies",
		Stream: "a", Version: 1, Time: time.Unix(1, 0).UTC(), Position: domain.Position{Topic: "tallies.events", Seq: 1}, Data: []byte("{}")})
	join := func(r Record) (b []byte) {
		for _, h := range r.Headers {
			b = append(append(append(append(b, h.Key...), 0), h.Value...), 0)
		}
		return b
	}
	f.Add(r.Key, join(r), r.Value)
	f.Fuzz(func(t *testing.T, key, headers, value []byte) {
		first, ok := ParseEvent("tallies.events", Record{Key: key, Headers: split(headers), Value: value})
		if !ok {
			return
		}
		again, ok := ParseEvent("tallies.events", NewEventRecord(first))
		if !ok || cmp.Diff(first, again) != "" {
			t.Fatal(ok, cmp.Diff(first, again))
		}
	})
}

// split makes headers of names and values that zeros end.
func split(b []byte) (headers []Header) {
	var parts [][]byte
	start := 0
	for i, c := range b {
		if c == 0 {
			parts = append(parts, b[start:i])
			start = i + 1
		}
	}
	for i := 0; i+1 < len(parts); i += 2 {
		headers = append(headers, Header{string(parts[i]), parts[i+1]})
	}
	return headers
}

// FuzzFold: whatever lies in the journal, the fold goes over it, or halts on a newer format; what it accepts is
// public, dense and in order, though nobody may be able to read it.
func FuzzFold(f *testing.F) {
	whole := someFrame()
	good := newCommitRecord("a", 1, Commit{ID: uuid.MustParse("01980000-0000-7000-8000-000000000009"), Events: 2}, "", whole.encode())
	join := func(r Record) (b []byte) {
		for _, h := range r.Headers {
			b = append(append(append(append(b, h.Key...), 0), h.Value...), 0)
		}
		return b
	}
	f.Add(good.Key, join(good), good.Value)
	f.Add(good.Key, join(good), good.Value[:9])
	f.Add([]byte(nil), join(NewSkipRecord(0, 0)), []byte(nil))
	f.Fuzz(func(t *testing.T, key, headers, value []byte) {
		j := New[tally](Config{Service: "tallies", Topic: "tallies.events", Partitions: 1, Events: domain.EventsOf(marked{}),
			Log: NewMemory(1), Public: NewMemory(1), Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
		j.life = context.Background()
		p := j.partitions[0]
		r := Record{Key: key, Headers: split(headers), Value: value}
		b := Batch{Records: []Record{r, good, r}, Next: 3}
		for i := range b.Records {
			b.Records[i].Offset = int64(i)
		}
		if err := p.fold(b); err != nil {
			t.Fatal(err)
		}
		seq := int64(0)
		for _, r := range b.Records {
			if p.halted != nil && r.Offset >= p.next || !p.accepted(r.Offset) {
				continue
			}
			for _, public := range p.publicRecords(r, seq) {
				e, ok := ParseEvent("tallies.events", public)
				if seq++; !ok && len(r.Key) > 0 || ok && e.Seq != seq {
					t.Fatalf("event %d reads as %+v", seq, e)
				}
			}
		}
		if seq != p.seq {
			t.Fatalf("%d events are public, %d were accepted", seq, p.seq)
		}
	})
}

type (
	tally  int
	marked struct{ By int }
)

func (marked) EventName() string { return "tally.marked.v1" }

func (n tally) Evolve(e domain.Event) tally { return n + tally(e.(marked).By) }
func (n tally) Closed() bool                { return false }
