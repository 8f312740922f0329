//go:build bench

package bench_test

import (
	"context"
	"errors"
	"math"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"

	"github.com/google/uuid"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// replay is a log in which each of n streams goes through the same life. It is made up while it is read, so that it
// takes no memory beside what is measured.
type replay struct {
	life      []journal.Record
	partition []uint8 // of each stream
	ends      []int64
}

// newReplay makes a log of n commits, or as many as whole lives need.
func newReplay(t *testing.T, n int, life ...journal.Record) *replay {
	if n%len(life) != 0 {
		t.Fatalf("%d commits are no whole number of lives of %d", n, len(life))
	}
	r := &replay{life: life, partition: make([]uint8, n/len(life)), ends: make([]int64, partitions)}
	for i := range r.partition {
		p := journal.Partition(streamID(i, 0), partitions)
		r.partition[i] = uint8(p)
		r.ends[p] += int64(len(life))
	}
	return r
}

// streamID is a UUID in text: that of stream i, or with a number k above 0 of its k-th commit.
func streamID(i, k int) []byte {
	const digits = "0123456789abcdef"
	id := []byte("01980000-0000-7000-8000-000000000000")
	for at := len(id) - 1; i > 0; at, i = at-1, i/16 {
		id[at] = digits[i%16]
	}
	id[9], id[10] = digits[k/16], digits[k%16]
	return id
}

func (r *replay) Read(ctx context.Context, p int32, from int64, f func(journal.Batch) error) error {
	var b journal.Batch
	for i := range r.partition {
		if r.partition[i] != uint8(p) {
			continue
		}
		key := streamID(i, 0)
		for k, record := range r.life {
			headers := make([]journal.Header, len(record.Headers))
			for h, header := range record.Headers {
				switch {
				case header.Key == "wharf-commit":
					header.Value = streamID(i, k+1)
				case header.Key == "wharf-parent" && k > 0:
					header.Value = streamID(i, k)
				}
				headers[h] = header
			}
			record.Partition, record.Key, record.Headers, record.Offset = p, key, headers, b.Next
			b.Next++
			if record.Offset >= from {
				b.Records = append(b.Records, record)
			}
		}
		if len(b.Records) >= 500 {
			if err := f(b); err != nil {
				return err
			}
			b.Records = nil
		}
	}
	if len(b.Records) > 0 {
		if err := f(b); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return ctx.Err()
}

func (r *replay) End(_ context.Context, p int32) (int64, error) { return r.ends[p], nil }

func (r *replay) Append(context.Context, journal.Record) error { return journal.ErrRefused }

var errFilled = errors.New("filled")

// fill writes the log to a topic of the broker, in large batches.
func fill(t *testing.T, b broker, r *replay) (topic string) {
	t.Helper()
	kc, end := b.connect(t)
	defer end()
	topic = newService() + ".journal"
	remove := b.topics(t, kc, topic)
	t.Cleanup(remove)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var all sync.WaitGroup
	for p := range int32(partitions) {
		if r.ends[p] == 0 {
			continue
		}
		all.Go(func() {
			err := r.Read(ctx, p, 0, func(batch journal.Batch) error {
				for i := range batch.Records {
					record := &batch.Records[i]
					for _, h := range record.Headers {
						if h.Key == "wharf-commit" { // as Append does
							record.Headers = append([]journal.Header{{Key: "_watermill_message_uuid", Value: h.Value}}, record.Headers...)
						}
					}
				}
				if err := kc.PublicLog(topic).AppendBatch(ctx, p, batch.Records); err != nil {
					return err
				}
				if batch.Next == r.ends[p] {
					return errFilled
				}
				return nil
			})
			if !errors.Is(err, errFilled) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return topic
}

// life is what happens to a stream, in words and in records.
type life struct {
	what    string
	closed  bool
	records []journal.Record
}

// TestMemory measures what a stream costs that has gone through its life.
func TestMemory(t *testing.T) {
	type counter = journaltest.Counter
	finish := func(counter) ([]domain.Event, error) { return []domain.Event{journaltest.Finished{}}, nil }
	count := step[counter]{decide: journaltest.Count(1, math.MaxInt)}
	measureMemory[counter](t, journaltest.Events, life{"counter", false, capture(journaltest.Events, count)})
	measureMemory[counter](t, journaltest.Events,
		life{"counter", true, capture(journaltest.Events, count, step[counter]{decide: finish})})

	from := func(topic string, seq int64) domain.Position {
		return domain.Position{Topic: topic, Partition: 1, Seq: seq}
	}
	type order = orders.Order
	place := step[order]{decide: placed}
	rest := []step[order]{
		{cause: from("inventory.events", 1), decide: func(o order) ([]domain.Event, error) { return o.DecideItemReserved("85123A") }},
		{cause: from("inventory.events", 2), decide: func(o order) ([]domain.Event, error) { return o.DecideItemReserved("71053") }},
		{cause: from("payments.events", 1), decide: func(o order) ([]domain.Event, error) { return o.DecideConfirm() }},
		{cause: from("shipping.events", 1), decide: func(o order) ([]domain.Event, error) { return o.DecideShipped("Royal Mail", "RM1") }},
		{cause: from("shipping.events", 2), decide: func(o order) ([]domain.Event, error) { return o.DecideDelivered() }},
	}
	keyed := place
	keyed.key = uuid.NewString()
	for _, first := range []step[order]{place, keyed} {
		what := "order"
		if first.key != "" {
			what += " placed with a key"
		}
		confirmed := append([]step[order]{first}, rest[:3]...)
		measureMemory[order](t, orders.Events, life{what, false, capture(orders.Events, confirmed...)})
		measureMemory[order](t, orders.Events, life{what, true, capture(orders.Events, append(confirmed, rest[3:]...)...)})
	}

	type stock = inventory.Stock
	receive := step[stock]{decide: func(s stock) ([]domain.Event, error) { return s.DecideReceive(100) }}
	buyer := uuid.New()
	reserve := step[stock]{cause: from("orders.events", 1),
		decide: func(s stock) ([]domain.Event, error) { return s.DecideReserve(buyer, 6) }}
	measureMemory[stock](t, inventory.Events, life{"stock item", false, capture(inventory.Events, receive)})
	measureMemory[stock](t, inventory.Events, life{"stock item with a reservation", false, capture(inventory.Events, receive, reserve)})
}

// measureMemory folds as many streams as are wanted, and looks at how much more memory is in use then.
func measureMemory[S commands.State[S]](t *testing.T, events domain.Events, l life) {
	t.Run(map[bool]string{true: "closed ", false: "open "}[l.closed]+l.what, func(t *testing.T) {
		r := newReplay(t, *streams*len(l.records), l.records...)
		live, held := heap()
		f := foldRun[S](t, watched{r, r.ends, new(sync.WaitGroup)}, events, *streams*len(l.records))
		liveNow, heldNow := heap()
		f.stop()
		runtime.KeepAlive(r)
		runtime.KeepAlive(f.journal)
		id, n := float64(len(streamID(0, 0))), float64(*streams)
		if !l.closed {
			results.add(row{measure: "memory of an open " + l.what + ", beyond its id: bytes"}, (liveNow-live)/n-id, math.NaN())
			return
		}
		results.add(row{measure: "memory of a closed " + l.what + ", beyond its id: bytes", most: 1},
			(liveNow-live)/n-id, closedBytes)
		results.add(row{measure: "  heap of ten million (" + l.what + "), with ids: GiB", most: 1},
			(heldNow-held)/n*1e7/(1<<30), tenMillion)
	})
}

// heap is how many bytes of it objects take, after everything that can be collected was, and how many it takes itself:
// what lies between them can be used again.
func heap() (live, held float64) {
	for range 2 {
		debug.FreeOSMemory()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc), float64(m.HeapInuse)
}
