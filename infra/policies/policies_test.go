package policies_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kfake"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/policies"
)

const partitions = 2

// warehouse is the inventory service on a broker in this process, and the topics that it listens to.
type warehouse struct {
	t       *testing.T
	client  *kafka.Client
	journal *journal.Journal[inventory.Stock]
	seq     int64 // of the events told so far
}

func newWarehouse(t *testing.T) *warehouse {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.GroupMinSessionTimeout(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	client, err := kafka.Connect(t.Context(), kafka.Config{Brokers: cluster.ListenAddrs(), SessionTimeout: 6 * time.Second, Heartbeat: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	var specs []kafka.TopicSpec
	for _, name := range []string{"inventory.journal", "inventory.events", "orders.events", "shipping.events"} {
		specs = append(specs, kafka.TopicSpec{Name: name, Partitions: partitions, Replication: 1})
	}
	if err := client.CreateTopics(t.Context(), specs); err != nil {
		t.Fatal(err)
	}
	w := &warehouse{t: t, client: client}
	w.journal = journal.New[inventory.Stock](journal.Config{Service: "inventory", Topic: "inventory.events",
		Partitions: partitions, Events: inventory.Events, Log: client.Log("inventory.journal"), Public: client.PublicLog("inventory.events")})
	return w
}

// start runs the policies until they are stopped.
func (w *warehouse) start() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.journal.Run(ctx) })
	runner := policies.New(w.client, policies.Config[inventory.Stock]{Service: "inventory",
		Topics: []string{"orders.events", "shipping.events"}, Journal: w.journal, Policies: commands.Inventory, Logger: slog.Default()})
	wg.Go(func() {
		if err := runner.Run(ctx); err != nil {
			w.t.Error(err)
		}
	})
	return sync.OnceFunc(func() { cancel(); wg.Wait() })
}

// placed tells of an order, all of them in partition 0.
func (w *warehouse) placed(items ...domain.Quantity) uuid.UUID {
	w.t.Helper()
	id := uuid.New()
	data, err := domain.Encode(orders.Placed{Items: items})
	if err != nil {
		w.t.Fatal(err)
	}
	w.seq++
	r := journal.NewEventRecord(domain.Recorded{ID: uuid.New(), Name: "order.placed.v1", Service: "orders", Stream: id.String(),
		Version: 1, Time: time.Now(), Position: domain.Position{Topic: "orders.events", Seq: w.seq}, Data: data})
	if err := w.client.PublicLog("orders.events").AppendBatch(w.t.Context(), 0, []journal.Record{r}); err != nil {
		w.t.Fatal(err)
	}
	return id
}

func (w *warehouse) receive(sku string, n int64) {
	w.t.Helper()
	_, err := w.journal.Handle(w.t.Context(), commands.Command{Stream: sku, IfMatch: commands.AnyVersion},
		func(s inventory.Stock) ([]domain.Event, error) { return s.DecideReceive(n) })
	if err != nil {
		w.t.Fatal(err)
	}
}

// reserved waits until units of the SKU are set aside for the order.
func (w *warehouse) reserved(sku string, order uuid.UUID) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	w.journal.Watch(ctx, journal.Partition([]byte(sku), partitions), func(stream string, s inventory.Stock, _ domain.Position) {
		if stream == sku && s.Reserved(order) > 0 {
			cancel()
		}
	})
	if !errors.Is(ctx.Err(), context.Canceled) {
		w.t.Fatalf("nothing of %s is reserved for order %s", sku, order)
	}
}

func TestAQuarantinedStreamBlocksNoOther(t *testing.T) {
	w := newWarehouse(t)
	// The first commit of BAD cannot be read.
	h := func(k, v string) journal.Header { return journal.Header{Key: k, Value: []byte(v)} }
	if err := w.client.Log("inventory.journal").Append(t.Context(), journal.Record{
		Partition: journal.Partition([]byte("BAD"), partitions), Key: []byte("BAD"), Value: []byte("no frame"),
		Headers: []journal.Header{h("wharf-format", "1"), h("wharf-commit", uuid.Must(uuid.NewV7()).String()), h("wharf-parent", ""),
			h("wharf-version", "0"), h("wharf-events", "1"), h("wharf-partitions", "2")},
	}); err != nil {
		t.Fatal(err)
	}
	stop := w.start()
	defer stop()
	w.receive("MUG", 10)
	w.receive("LAMP", 10)
	first := w.placed(domain.Quantity{SKU: "BAD", Quantity: 1}, domain.Quantity{SKU: "MUG", Quantity: 1})
	second := w.placed(domain.Quantity{SKU: "LAMP", Quantity: 1}, domain.Quantity{SKU: "BAD", Quantity: 1})
	third := w.placed(domain.Quantity{SKU: "MUG", Quantity: 2})
	w.reserved("MUG", first)
	w.reserved("LAMP", second)
	w.reserved("MUG", third)
	stop()
	// The first event is not done, so nothing behind it is committed: all of it will be looked at again.
	if lag, _, err := w.client.GroupLag(t.Context(), policies.Group("inventory"), []string{"orders.events"}); err != nil || lag != 3 {
		t.Errorf("the lag is %d: %v", lag, err)
	}
}

func TestAnEventIsHandledOnceAcrossRestarts(t *testing.T) {
	w := newWarehouse(t)
	stop := w.start()
	w.receive("MUG", 1000)
	const n = 50
	for range n {
		w.reserved("MUG", w.placed(domain.Quantity{SKU: "MUG", Quantity: 1}))
	}
	stop()
	// Whatever was not committed comes again, to a journal that has read everything anew.
	w.journal = journal.New[inventory.Stock](w.journal.Config)
	stop = w.start()
	defer stop()
	w.reserved("MUG", w.placed(domain.Quantity{SKU: "MUG", Quantity: 1}))
	r, err := w.journal.Handle(t.Context(), commands.Command{Stream: "MUG", IfMatch: commands.AnyVersion},
		func(s inventory.Stock) ([]domain.Event, error) {
			if s.Available != 1000-n-1 {
				t.Errorf("%d units are available", s.Available)
			}
			return nil, nil
		})
	if err != nil || r.Version != n+2 {
		t.Errorf("version %d: %v", r.Version, err)
	}
}

// An event that this program cannot decode halts its source partition: nothing that comes after it may overtake it, and
// nothing is lost. That it waits is known to everybody. A program that can decode it goes on from there.
func TestAnEventThatCannotBeDecodedIsNeverPassedOver(t *testing.T) {
	w := newWarehouse(t)
	stop := w.start()
	w.receive("MUG", 10)
	w.reserved("MUG", w.placed(domain.Quantity{SKU: "MUG", Quantity: 1}))
	w.seq++
	bad := journal.NewEventRecord(domain.Recorded{ID: uuid.New(), Name: "order.placed.v1", Service: "orders", Stream: "order-2",
		Version: 1, Time: time.Now(), Position: domain.Position{Topic: "orders.events", Seq: w.seq}, Data: []byte(`{"items": 7}`)})
	if err := w.client.PublicLog("orders.events").AppendBatch(t.Context(), 0, []journal.Record{bad}); err != nil {
		t.Fatal(err)
	}
	after := w.placed(domain.Quantity{SKU: "MUG", Quantity: 2})
	var parked []kafka.ParkedIn
	for deadline := time.Now().Add(30 * time.Second); len(parked) == 0; time.Sleep(10 * time.Millisecond) {
		lag, found, err := w.client.GroupLag(t.Context(), policies.Group("inventory"), []string{"orders.events"})
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("nothing is parked, the lag is %d: %v", lag, err)
		}
		parked = found
	}
	if p := parked[0]; p.Target != "order-2" || p.Topic != "orders.events" || p.Partition != 0 || p.Seq != 2 || p.Reason == "" {
		t.Errorf("parked is %+v", p)
	}
	stop()
	_, err := w.journal.Handle(bounded(t), commands.Command{Stream: "MUG", IfMatch: commands.AnyVersion},
		func(s inventory.Stock) ([]domain.Event, error) {
			if s.Reserved(after) > 0 {
				t.Error("an event has overtaken one that could not be decoded")
			}
			return nil, nil
		})
	if err == nil {
		t.Error("the journal goes on without its Run")
	}
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}
