package orders_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"wharf/commands"
	ordersapi "wharf/commands/orders"
	"wharf/domain"
	"wharf/domain/orders"
	"wharf/infra/journal"
)

// inTime runs the test with a journal in memory, in a bubble whose clock jumps ahead when everybody waits.
func inTime(t *testing.T, test func(t *testing.T, s ordersapi.Service, run func(func(context.Context)))) {
	synctest.Test(t, func(t *testing.T) {
		j := journal.New[orders.Order](journal.Config{Service: "orders", Topic: "orders.events", Partitions: 1,
			Events: orders.Events, Log: journal.NewMemory(1), Public: journal.NewMemory(1)})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		run := func(f func(context.Context)) { wg.Go(func() { f(ctx) }) }
		run(func(ctx context.Context) { _ = j.Run(ctx) })
		test(t, ordersapi.Service{Journal: j, Deadline: 15 * time.Minute, Now: time.Now}, run)
		cancel()
		wg.Wait()
	})
}

func do(t *testing.T, s ordersapi.Service, order string, decide commands.Decision[orders.Order]) orders.Order {
	t.Helper()
	var seen orders.Order
	_, err := s.Journal.Handle(t.Context(), commands.Command{Stream: order, IfMatch: commands.AnyVersion},
		func(o orders.Order) ([]domain.Event, error) {
			seen = o
			return decide(o)
		})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

func status(t *testing.T, s ordersapi.Service, order string) orders.Status {
	t.Helper()
	return do(t, s, order, func(orders.Order) ([]domain.Event, error) { return nil, nil }).Status
}

func place(t *testing.T, s ordersapi.Service, order string) {
	t.Helper()
	lines := []orders.Line{{SKU: "MUG", Quantity: 1, UnitPrice: domain.Money{Amount: 100, Currency: "GBP"}}}
	do(t, s, order, func(o orders.Order) ([]domain.Event, error) {
		return o.DecidePlace("c", lines, s.Now().Add(s.Deadline))
	})
}

func TestAnOrderThatIsNotConfirmedInTimeExpires(t *testing.T) {
	inTime(t, func(t *testing.T, s ordersapi.Service, run func(func(context.Context))) {
		place(t, s, "early")
		run(func(ctx context.Context) { s.Deadlines(ctx, 0) })
		time.Sleep(5 * time.Minute)
		place(t, s, "late")
		place(t, s, "confirmed")
		do(t, s, "confirmed", func(o orders.Order) ([]domain.Event, error) { return o.DecideItemReserved("MUG") })
		do(t, s, "confirmed", orders.Order.DecideConfirm)
		for _, step := range []struct {
			wait        time.Duration
			early, late orders.Status
		}{
			{10*time.Minute - time.Second, orders.StatusPlaced, orders.StatusPlaced},
			{2 * time.Second, orders.StatusExpired, orders.StatusPlaced},
			{5*time.Minute - 3*time.Second, orders.StatusExpired, orders.StatusPlaced},
			{3 * time.Second, orders.StatusExpired, orders.StatusExpired},
		} {
			time.Sleep(step.wait)
			synctest.Wait()
			if early, late := status(t, s, "early"), status(t, s, "late"); early != step.early || late != step.late {
				t.Fatalf("the orders are %s and %s, want %s and %s", early, late, step.early, step.late)
			}
		}
		time.Sleep(time.Hour)
		if got := status(t, s, "confirmed"); got != orders.StatusConfirmed {
			t.Errorf("a confirmed order is %s", got)
		}
	})
}

func TestDeadlinesThatPassedMeanwhileAreDueAtOnce(t *testing.T) {
	inTime(t, func(t *testing.T, s ordersapi.Service, run func(func(context.Context))) {
		place(t, s, "a")
		time.Sleep(time.Hour)
		if got := status(t, s, "a"); got != orders.StatusPlaced {
			t.Fatalf("nobody was there, and the order is %s", got)
		}
		run(func(ctx context.Context) { s.Deadlines(ctx, 0) })
		time.Sleep(time.Second)
		if got := status(t, s, "a"); got != orders.StatusExpired {
			t.Errorf("the order is %s", got)
		}
	})
}
