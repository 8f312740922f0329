package journal_test

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/google/uuid"

	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// verdict is what the oracle says of one partition of the journal. The oracle is the acceptance rule once more, written
// without a look at the production code's, for records that the simulation knows to be commits.
type verdict struct {
	records  int // of the partition that it has seen
	accepted []acceptedCommit
	events   int
	heads    map[string]journal.Head
	halts    []int64 // offsets that were skipped
}

type acceptedCommit struct {
	simRecord
	journal.Commit
	stream string
	seq    int64 // of its first event
}

func (w *world) accepted(p int32) *verdict {
	part := &w.journal.partitions[p]
	if w.oracle[p] == nil || w.oracle[p].records != len(part.records) {
		w.oracle[p] = judge(part.records)
	}
	return w.oracle[p]
}

func judge(records []simRecord) *verdict {
	v := &verdict{records: len(records), heads: map[string]journal.Head{}}
	for i, r := range records {
		if r.tooNew {
			if !slices.ContainsFunc(records[i+1:], func(s simRecord) bool { return s.skip == r.Offset }) {
				return v // halted: nothing behind it counts
			}
			v.halts = append(v.halts, r.Offset)
		}
		if r.bad || r.tooNew {
			continue
		}
		get := func(key string) string {
			return string(r.Headers[slices.IndexFunc(r.Headers, func(h journal.Header) bool { return h.Key == key })].Value)
		}
		c := acceptedCommit{simRecord: r, stream: string(r.Key), seq: int64(v.events) + 1}
		c.ID, c.Parent.Commit = uuid.MustParse(get("wharf-commit")), uuid.UUID{}
		if parent := get("wharf-parent"); parent != "" {
			c.Parent.Commit = uuid.MustParse(parent)
		}
		c.Parent.Version, _ = strconv.ParseInt(get("wharf-version"), 10, 64)
		c.Events, _ = strconv.Atoi(get("wharf-events"))
		if v.heads[c.stream] != c.Parent {
			continue
		}
		v.heads[c.stream] = journal.Head{Commit: c.ID, Version: c.Parent.Version + int64(c.Events)}
		v.events += c.Events
		v.accepted = append(v.accepted, c)
	}
	return v
}

func (w *world) head(stream string) journal.Head {
	return w.accepted(journal.Partition([]byte(stream), simPartitions)).heads[stream]
}

// published is the public topic's records that are not somebody else's.
func (w *world) published(p int32) (records []journal.Record) {
	for _, r := range w.public.partitions[p].records {
		if !r.bad {
			records = append(records, r.Record)
		}
	}
	return records
}

// consumed is how many events a consumer of the partition has got. It stops at a gap.
func (w *world) consumed(p int32) (n int) {
	for _, r := range w.published(p) {
		if e, ok := journal.ParseEvent("counters.events", r); ok && e.Seq == int64(n)+1 {
			n++
		}
	}
	return n
}

// check is what must hold of every run, whatever went wrong in it.
func (w *world) check() error {
	var all [][]journal.Record
	for p := range int32(simPartitions) {
		if err := w.checkPublic(p); err != nil {
			return err
		}
		var everything []journal.Record // with what others have put there
		for _, r := range w.public.partitions[p].records {
			everything = append(everything, r.Record)
		}
		all = append(all, everything)
	}
	events, err := journaltest.Consume(all...)
	if err != nil {
		return err
	}
	effects, err := journaltest.Effects(events)
	if err != nil {
		return err
	}
	if err := w.checkTimes(effects); err != nil {
		return err
	}
	if err := w.checkSources(events, effects); err != nil {
		return err
	}
	return w.history.Check(events)
}

// checkPublic compares the public topic with what the oracle accepted: dense, in order, every repetition equal, and
// nothing there before it was accepted.
func (w *world) checkPublic(p int32) error {
	v := w.accepted(p)
	where := map[int64]journal.Record{}
	var want []domain.Recorded
	for _, c := range v.accepted {
		for i := range c.Events {
			want = append(want, domain.Recorded{Stream: c.stream, Version: c.Parent.Version + int64(i) + 1, Offset: c.Offset, Index: i,
				Position: domain.Position{Topic: "counters.events", Partition: p, Seq: c.seq + int64(i)}})
		}
	}
	last := int64(0)
	for _, r := range w.public.partitions[p].records {
		if r.bad {
			continue
		}
		e, ok := journal.ParseEvent("counters.events", r.Record)
		if !ok {
			return fmt.Errorf("record %d of the public partition %d is no event", r.Offset, p)
		}
		if e.Seq > last+1 {
			return fmt.Errorf("the public partition %d has a gap: event %d follows %d", p, e.Seq, last)
		}
		last = max(last, e.Seq)
		if e.Seq > int64(len(want)) {
			return fmt.Errorf("the public partition %d has event %d, but only %d were accepted", p, e.Seq, len(want))
		}
		x := want[e.Seq-1]
		if e.Stream != x.Stream || e.Version != x.Version || e.Offset != x.Offset || e.Index != x.Index {
			return fmt.Errorf("event %d of the public partition %d is version %d of %s, of journal offset %d; accepted was version %d of %s, of journal offset %d",
				e.Seq, p, e.Version, e.Stream, e.Offset, x.Version, x.Stream, x.Offset)
		}
		if first, again := where[e.Seq]; again && !sameBytes(first, r.Record) {
			return fmt.Errorf("event %d of the public partition %d is told in two ways:\n%s\n%s", e.Seq, p, tell(first), tell(r.Record))
		}
		where[e.Seq] = r.Record
		if at := w.readable(p, e.Offset); r.step < at {
			return fmt.Errorf("event %d of the public partition %d was published in front of a record of a newer format, which was skipped only in step %d", e.Seq, p, at)
		}
	}
	if last != int64(len(want)) {
		return fmt.Errorf("the public partition %d has %d of %d events", p, last, len(want))
	}
	return nil
}

func tell(r journal.Record) string {
	s := ""
	for _, h := range r.Headers {
		s += fmt.Sprintf("%s=%s ", h.Key, h.Value)
	}
	return s + string(r.Value)
}

func sameBytes(a, b journal.Record) bool {
	return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) &&
		slices.EqualFunc(a.Headers, b.Headers, func(a, b journal.Header) bool {
			return a.Key == b.Key && bytes.Equal(a.Value, b.Value)
		})
}

// readable is the step from which the journal's record at the offset may count: later than its own, when a record of a
// newer format in front of it had to be skipped first.
func (w *world) readable(p int32, offset int64) (step int64) {
	for _, halt := range w.accepted(p).halts {
		if halt > offset {
			continue
		}
		first := int64(math.MaxInt64)
		for _, r := range w.journal.partitions[p].records {
			if r.skip == halt {
				first = min(first, r.step)
			}
		}
		step = max(step, first)
	}
	return step
}

// checkSources looks for events of other services that were acked and have not been heeded. Only a closed stream does
// not heed them.
func (w *world) checkSources(events []domain.Recorded, effects map[string]journaltest.Effect) error {
	closed := map[string]bool{}
	for _, e := range events {
		if e.Name == (journaltest.Finished{}).EventName() {
			closed[e.Stream] = true
		}
	}
	for _, s := range w.sources {
		if !s.finished() {
			return fmt.Errorf("%s/%d is done up to %d of %d", s.topic, s.partition, s.committed, len(s.events))
		}
		for i, e := range s.events[:s.committed] {
			for target, a := range e.asks {
				if _, done := effects[a.Op]; !done && !closed[target] && !w.poisoned[target] {
					return fmt.Errorf("event %d of %s/%d was acked, and %s has not heard of it", i+1, s.topic, s.partition, target)
				}
			}
		}
	}
	return nil
}

// checkTimes holds every effect against the time of the attempts at it: its commit was proposed while one was under way
// (never after its client was told that the outcome is unknown), and nobody was told of it before it counted.
func (w *world) checkTimes(effects map[string]journaltest.Effect) error {
	commits := map[string]acceptedCommit{}
	for p := range int32(simPartitions) {
		for _, c := range w.accepted(p).accepted {
			commits[fmt.Sprint(p, " ", c.Offset)] = c
		}
	}
	inTime := map[string]bool{}
	for _, a := range w.history.Attempts() {
		e, ok := effects[a.Op]
		if !ok {
			continue
		}
		call, answer := a.Interval()
		c := commits[fmt.Sprint(e.Last.Partition, " ", e.Last.Offset)]
		sent := w.sent[c.ID.String()]
		inTime[a.Op] = inTime[a.Op] || call <= sent && sent <= answer
		if a.Done() && answer < max(c.step, w.readable(e.Last.Partition, e.Last.Offset)) {
			return fmt.Errorf("answered before it counted, in step %d: %s", max(c.step, w.readable(e.Last.Partition, e.Last.Offset)), a)
		}
	}
	for op, e := range effects {
		if !inTime[op] {
			c := commits[fmt.Sprint(e.Last.Partition, " ", e.Last.Offset)]
			return fmt.Errorf("%s was done by commit %s, first sent in step %d, when nobody waited for it", op, c.ID, w.sent[c.ID.String()])
		}
	}
	return nil
}

// garbage puts something into a topic that no reader may take for a commit or for an event.
func (w *world) garbage() {
	stream := w.streams[w.rnd.IntN(len(w.streams))]
	p := journal.Partition([]byte(stream), simPartitions)
	if w.rnd.IntN(3) == 0 {
		w.say("somebody writes into the public topic")
		r := journal.Record{Key: []byte(stream), Value: []byte("{}")}
		switch known := w.public.partitions[p].records; {
		case len(known) == 0:
		case w.rnd.IntN(3) == 0: // an event that is told already, with a place that it does not have
			e, ok := journal.ParseEvent("counters.events", known[w.rnd.IntN(len(known))].Record)
			if !ok || w.consumed(p) == 0 {
				return
			}
			e.Seq = 1 + w.rnd.Int64N(int64(w.consumed(p)))
			e.Offset, e.Index = w.rnd.Int64N(w.journal.partitions[p].end), w.rnd.IntN(3)
			e.Data = []byte(`{"forged": true}`)
			r = journal.NewEventRecord(e)
		case w.rnd.IntN(2) == 0: // what would be the next event, but for its source
			e, _ := journal.ParseEvent("counters.events", known[w.rnd.IntN(len(known))].Record)
			e.Seq, e.Data = int64(w.consumed(p))+1, []byte(`{"forged": true}`)
			r = journal.NewEventRecord(e)
			r.Headers = slices.DeleteFunc(r.Headers, func(h journal.Header) bool { return h.Key == "ce_source" })
		default:
			r.Headers = []journal.Header{{Key: "ce_id", Value: []byte("1")}, {Key: "ce_specversion", Value: []byte("1.0")}}
		}
		w.put(w.public, p, simRecord{Record: r, bad: true, skip: -1})
		return
	}
	// What would be accepted, but for one thing.
	head := w.head(stream)
	parent := ""
	if head.Version > 0 || head.Commit != uuid.Nil {
		parent = head.Commit.String()
	}
	id := (&idSource{random: w.rnd}).next().String()
	r := commit(stream, id, parent, fmt.Sprint(head.Version), "1", []byte("forged"))
	set := func(key, value string) {
		i := slices.IndexFunc(r.Headers, func(h journal.Header) bool { return h.Key == key })
		r.Headers[i].Value = []byte(value)
	}
	set("wharf-partitions", strconv.Itoa(simPartitions))
	what := w.rnd.IntN(8)
	switch what {
	case 0:
		r.Headers = r.Headers[1:] // no format
	case 1:
		set("wharf-format", "0")
	case 2:
		i := 1 + w.rnd.IntN(len(r.Headers)-1)
		r.Headers = slices.Delete(r.Headers, i, i+1)
	case 3:
		r.Headers = append(r.Headers, r.Headers[1+w.rnd.IntN(len(r.Headers)-1)])
	case 4:
		set("wharf-partitions", strconv.Itoa(simPartitions+1))
	case 5:
		p = (p + 1) % simPartitions
	case 6:
		set("wharf-version", fmt.Sprint(head.Version+1+w.rnd.Int64N(5)))
	case 7:
		set("wharf-parent", (&idSource{random: w.rnd}).next().String())
	}
	w.say("somebody writes garbage %d into the journal, to %s", what, stream)
	w.put(w.journal, p, simRecord{Record: r, bad: true, skip: -1})
}

// newer puts a record of a newer format into the journal, whose other headers mean nothing to this program.
func (w *world) newer() {
	stream := w.streams[w.rnd.IntN(len(w.streams))]
	r := commit(stream, "x", "y", "z", "-1", nil)
	r.Headers[0].Value = []byte("2")
	r.Headers = r.Headers[:1+w.rnd.IntN(len(r.Headers))]
	w.say("a newer program writes to %s", stream)
	w.put(w.journal, journal.Partition([]byte(stream), simPartitions), simRecord{Record: r, tooNew: true, skip: -1})
}

// poison forges a commit that counts, and cannot be read.
func (w *world) poison() {
	stream := w.streams[w.rnd.IntN(len(w.streams))]
	head := w.head(stream)
	if head.Commit == uuid.Nil || w.rnd.IntN(8) > 0 {
		return
	}
	w.poisoned[stream] = true
	w.say("somebody poisons %s", stream)
	r := commit(stream, (&idSource{random: w.rnd}).next().String(), head.Commit.String(), fmt.Sprint(head.Version), "2", []byte("forged"))
	r.Headers[5].Value = []byte(strconv.Itoa(simPartitions))
	w.put(w.journal, journal.Partition([]byte(stream), simPartitions), simRecord{Record: r, skip: -1})
}
