//go:build bench

package bench_test

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"wharf/domain"
	"wharf/domain/domaintest"
	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
	"wharf/infra/kafka"
	invoice "wharf/infra/load"
	"wharf/projections"
)

// told is the public topics of the shop with a log of orders, at a broker of its own: the topics' names are given, and
// what is deleted is not always gone at once.
type told struct {
	name   string
	broker broker
	client *kafka.Client
	orders []uuid.UUID
	counts map[string]int64 // events by topic
}

// items of each made-up order: it has 20 events of its own then, and 16 of stock.
const items = 8

// tellOrders makes a log of n made-up orders.
func tellOrders(t *testing.T, n int) *told {
	lines := make([]orders.Line, items)
	return tell(t, fmt.Sprintf("%d orders", n), n, func(i int) []orders.Line {
		for l := range lines {
			lines[l] = lineOf(i + l)
		}
		return lines
	})
}

func lineOf(i int) orders.Line {
	return orders.Line{SKU: fmt.Sprintf("SKU-%d", i%1000), Quantity: int64(1 + i%3), UnitPrice: domain.Money{Amount: 250, Currency: "GBP"}}
}

// tellFile makes a log of the invoices of a file.
func tellFile(t *testing.T, file string) *told {
	lines, err := invoice.Lines(file)
	if err != nil {
		t.Fatal(err)
	}
	return tell(t, "the file", len(lines), func(i int) []orders.Line { return lines[i] })
}

func tell(t *testing.T, name string, n int, lines func(i int) []orders.Line) *told {
	t.Helper()
	b := broker{name: "kfake"}
	if err := b.startKfake(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.stop)
	client, end := b.connect(t)
	t.Cleanup(end)
	b.topics(t, client, projections.Topics...)
	l := &told{name: name, broker: b, client: client, counts: map[string]int64{}}
	teller := journaltest.NewTeller(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), partitions, projections.Topics...)
	const batch = 500
	waiting := map[string][]journal.Record{} // by topic and partition
	var sending errgroup.Group
	sending.SetLimit(2 * partitions)
	turns := map[string]*sync.Mutex{}
	send := func(topic string, records []journal.Record) {
		place := fmt.Sprint(topic, records[0].Partition)
		if turns[place] == nil {
			turns[place] = new(sync.Mutex)
		}
		turn := turns[place]
		turn.Lock() // one after the other
		sending.Go(func() error {
			defer turn.Unlock()
			return client.PublicLog(topic).AppendBatch(t.Context(), records[0].Partition, records)
		})
	}
	for i := range n {
		id := uuid.NewSHA1(uuid.Nil, fmt.Appendf(nil, "order %d", i))
		l.orders = append(l.orders, id)
		domaintest.Deliver(id, fmt.Sprintf("customer %d", i%1000), lines(i), func(stream string, events ...domain.Event) {
			for _, e := range events {
				data, err := domain.Encode(e)
				if err != nil {
					t.Fatal(err)
				}
				kind, _, _ := strings.Cut(e.EventName(), ".")
				topic := map[string]string{"order": projections.OrdersTopic, "stock": projections.InventoryTopic,
					"payment": projections.PaymentsTopic, "shipment": projections.ShippingTopic}[kind]
				r := journal.NewEventRecord(teller.Next(topic, stream, e.EventName(), data))
				place := fmt.Sprint(topic, "/", r.Partition)
				l.counts[topic]++
				if waiting[place] = append(waiting[place], r); len(waiting[place]) == batch {
					send(topic, waiting[place])
					waiting[place] = nil
				}
			}
		})
	}
	for place, records := range maps.All(waiting) {
		if topic, _, _ := strings.Cut(place, "/"); len(records) > 0 {
			send(topic, records)
		}
	}
	if err := sending.Wait(); err != nil {
		t.Fatal(err)
	}
	return l
}

// events is how many of them the model reads.
func (l *told) events(m projections.Model) (n int64) {
	for _, topic := range m.Topics {
		n += l.counts[topic]
	}
	return n
}

func (l *told) source(topic string) journal.Reader { return l.client.Reader(topic) }

// consume reads everything that the model reads, and does nothing with it.
func (l *told) consume(t *testing.T, m projections.Model) time.Duration {
	began := time.Now()
	group, ctx := errgroup.WithContext(t.Context())
	for _, topic := range m.Topics {
		for p := range int32(partitions) {
			group.Go(func() error {
				end, err := l.source(topic).End(ctx, p)
				if err != nil || end == 0 {
					return err
				}
				ctx, enough := context.WithCancel(ctx)
				err = l.source(topic).Read(ctx, p, 0, func(b journal.Batch) error {
					if b.Next >= end {
						enough()
					}
					return nil
				})
				if ctx.Err() != nil {
					return nil
				}
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	return time.Since(began)
}
