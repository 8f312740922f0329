package journal_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"wharf/infra/journal"
)

// topic is a simulated topic: what is in it, and what is on its way to it.
type topic struct {
	name       string
	partitions []simPartition
}

type simPartition struct {
	records []simRecord
	end     int64
}

// simRecord is a record with what the simulation knows of it, without looking at its headers.
type simRecord struct {
	journal.Record
	step   int64
	bad    bool  // not a commit, or not an event: to be ignored
	tooNew bool  // of a newer format
	skip   int64 // the offset that an operator wants skipped, or -1
}

func newTopic(name string, partitions int) *topic {
	return &topic{name: name, partitions: make([]simPartition, partitions)}
}

// put appends. Now and then an offset stays without a record, as behind a transaction's end.
func (w *world) put(t *topic, p int32, rs ...simRecord) {
	part := &t.partitions[p]
	for _, r := range rs {
		r.Partition, r.Offset, r.Time, r.step = p, part.end, time.Unix(w.step, 0), w.step
		part.records = append(part.records, r)
		part.end++
	}
	if w.holes && w.rnd.IntN(8) == 0 {
		part.end++
	}
}

func (w *world) putPlain(t *topic, p int32, rs []journal.Record) {
	for _, r := range rs {
		w.put(t, p, simRecord{Record: r, skip: -1})
	}
}

// request is a call of the log that waits for the scheduler to say what becomes of it.
type request struct {
	order     string // a name that is the same in every run of the seed
	replica   *replica
	kind      string // "read", "end", "append" or "publish"
	topic     *topic
	partition int32
	from      int64
	records   []journal.Record
	asked     bool // an end: it was evaluated, and the answer is on its way
	end       int64
	gone      bool // its caller has left
	answer    chan answer
}

type answer struct {
	batch journal.Batch
	end   int64
	err   error
}

// simLog is a topic as one incarnation of a replica sees it. It implements journal.Log and journal.PublicLog.
type simLog struct {
	w *world
	r *replica
	t *topic
}

type labelKey struct{}

// wait hands the request to the scheduler.
func (l simLog) wait(ctx context.Context, q *request) answer {
	if err := ctx.Err(); err != nil {
		return answer{err: err}
	}
	label, _ := ctx.Value(labelKey{}).(string)
	q.replica, q.topic, q.answer = l.r, l.t, make(chan answer, 1)
	q.order = fmt.Sprintf("%s %s %s %s/%d %s", l.r.name, label, q.kind, l.t.name, q.partition, commitOf(q.records))
	l.w.mu.Lock()
	l.w.requests = append(l.w.requests, q)
	if q.kind == "append" {
		id := commitOf(q.records)
		if _, sent := l.w.sent[id]; !sent {
			l.w.sent[id] = l.w.step
		}
	}
	l.w.mu.Unlock()
	select {
	case a := <-q.answer:
		return a
	case <-ctx.Done():
		l.w.mu.Lock()
		q.gone = true
		l.w.mu.Unlock()
		return answer{err: ctx.Err()}
	}
}

func commitOf(rs []journal.Record) string {
	for _, r := range rs {
		for _, h := range r.Headers {
			if h.Key == "wharf-commit" || h.Key == "ce_id" {
				return string(h.Value)
			}
		}
	}
	return ""
}

func (l simLog) Read(ctx context.Context, partition int32, from int64, f func(journal.Batch) error) error {
	for {
		a := l.wait(ctx, &request{kind: "read", partition: partition, from: from})
		if a.err != nil {
			return a.err
		}
		from = a.batch.Next
		if err := f(a.batch); err != nil {
			return err
		}
	}
}

func (l simLog) End(ctx context.Context, partition int32) (int64, error) {
	a := l.wait(ctx, &request{kind: "end", partition: partition})
	return a.end, a.err
}

func (l simLog) Append(ctx context.Context, r journal.Record) error {
	return l.wait(ctx, &request{kind: "append", partition: r.Partition, records: []journal.Record{r}}).err
}

func (l simLog) AppendBatch(ctx context.Context, partition int32, rs []journal.Record) error {
	return l.wait(ctx, &request{kind: "publish", partition: partition, records: slices.Clone(rs)}).err
}

// stray is a copy of an append that is still in the network though nobody waits for it.
type stray struct {
	order     string
	topic     *topic
	partition int32
	records   []journal.Record
}

// settle begins a step: it takes the requests whose callers have left out of the list, and puts the rest in an order
// that does not depend on which goroutine came first.
func (w *world) settle() {
	w.mu.Lock()
	defer w.mu.Unlock()
	byOrder := func(a, b *request) int { return cmp.Compare(a.order, b.order) }
	slices.SortStableFunc(w.requests, byOrder)
	w.requests = slices.DeleteFunc(w.requests, func(q *request) bool {
		if q.gone && q.records != nil {
			w.strays = append(w.strays, q.stray())
		}
		return q.gone
	})
	w.pending = slices.Clone(w.requests)
	w.step++
}

func (q *request) stray() stray { return stray{q.order, q.topic, q.partition, q.records} }

func (w *world) reply(q *request, a answer) {
	q.answer <- a
	w.mu.Lock()
	w.requests = slices.DeleteFunc(w.requests, func(r *request) bool { return r == q })
	w.mu.Unlock()
}

var errAway = errors.New("the broker is away")

// deliver answers a read with some of what is there.
func (w *world) deliver(q *request, all bool) {
	part := q.topic.partitions[q.partition]
	var b journal.Batch
	i, _ := slices.BinarySearchFunc(part.records, q.from, func(r simRecord, o int64) int { return cmp.Compare(r.Offset, o) })
	n := len(part.records) - i
	if !all && n > 0 {
		n = 1 + w.rnd.IntN(n)
	}
	for _, r := range part.records[i : i+n] {
		b.Records = append(b.Records, r.Record)
		b.Next = r.Offset + 1
	}
	if i+n == len(part.records) {
		b.Next = part.end
	}
	w.reply(q, answer{batch: b})
}

// appendFault is what becomes of an append, beside its answer: whether it is in the log now, and how many copies of it
// are still in the network.
type appendFault struct {
	name   string
	lands  int
	strays int
	err    error
}

var appendFaults = []appendFault{
	{"done, but unanswered", 1, 0, errAway},
	{"lost", 0, 0, errAway},
	{"done twice", 2, 0, nil},
	{"done, and a copy is under way", 1, 1, nil},
	{"late", 0, 1, errAway},
	{"late twice", 0, 2, errAway},
	{"done, unanswered, and a copy is under way", 1, 1, errAway},
}

func (w *world) landed(q *request, f appendFault) {
	for range f.lands {
		w.putPlain(q.topic, q.partition, q.records)
	}
	for range f.strays {
		w.strays = append(w.strays, q.stray())
	}
	w.reply(q, answer{err: f.err})
}
