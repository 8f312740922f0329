package orders

import (
	"container/heap"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/orders"
)

// Deadlines expires the orders of one partition that were not confirmed in time, until ctx ends. The owner of the
// partition runs it, after its policies have caught up: an order must not expire while the payment that confirms it
// lies unread. (Stock events lie in other partitions, perhaps another replica's, so of those it may.)
func (s Service) Deadlines(ctx context.Context, partition int32) {
	d := &deadlines{due: map[string]time.Time{}, changed: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	wg.Go(func() { s.Journal.Watch(ctx, partition, d.note) })
	defer wg.Wait()
	for {
		next, stream := d.first()
		wait := time.Hour
		if stream != "" {
			// Jitter keeps a crowd of orders that were placed together from expiring in the same moment.
			wait = next.Sub(s.Now()) + rand.N(50*time.Millisecond)
		}
		timer := time.NewTimer(max(wait, 0))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-d.changed:
			timer.Stop()
			continue
		case <-timer.C:
		}
		if stream == "" || s.Now().Before(next) {
			continue
		}
		d.drop(stream)
		wg.Go(func() { s.expire(ctx, stream, next) })
	}
}

// expire tries until it is certain that the order has ended or been confirmed. It is due, even if the clock has been
// set back since.
func (s Service) expire(ctx context.Context, stream string, due time.Time) {
	for delay := 100 * time.Millisecond; ctx.Err() == nil; delay = min(2*delay, 10*time.Second) {
		try, cancel := context.WithTimeout(ctx, 30*time.Second)
		_, err := s.Journal.Handle(try, commands.Command{Stream: stream, IfMatch: commands.AnyVersion},
			func(o orders.Order) ([]domain.Event, error) { return o.DecideExpire(due) })
		cancel()
		if err == nil || errors.Is(err, commands.ErrQuarantined) {
			return
		}
		if ctx.Err() == nil {
			slog.Warn("an order cannot be expired, trying again", "order", stream, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
	}
}

// deadlines are the open orders of a partition, earliest deadline first.
type deadlines struct {
	mu      sync.Mutex
	due     map[string]time.Time
	heap    dueHeap // may hold entries that due no longer has
	changed chan struct{}
}

func (d *deadlines) note(stream string, o orders.Order, _ domain.Position) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, open := o.Due()
	if !open {
		delete(d.due, stream)
		return
	}
	if old, known := d.due[stream]; known && old.Equal(at) {
		return
	}
	d.due[stream] = at
	heap.Push(&d.heap, dueEntry{at, stream})
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

func (d *deadlines) first() (at time.Time, stream string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.heap) > 0 {
		e := d.heap[0]
		if at, ok := d.due[e.stream]; ok && at.Equal(e.at) {
			return e.at, e.stream
		}
		heap.Pop(&d.heap)
	}
	return time.Time{}, ""
}

func (d *deadlines) drop(stream string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.due, stream)
}

type dueEntry struct {
	at     time.Time
	stream string
}

type dueHeap []dueEntry

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h dueHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *dueHeap) Push(x any)        { *h = append(*h, x.(dueEntry)) }
func (h *dueHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}
