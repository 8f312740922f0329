// Package audit answers the question "does the running shop keep its promises?". Run waits until the shop is at rest,
// reads all it has to say over HTTP, and checks the invariants that no single service could check alone. Read this
// file first; checks.go holds the invariants, each a function of what was read.
package audit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"wharf/domain/orders"
	"wharf/infra/shop"
)

// Options of Run.
type Options struct {
	URL         string
	Wait        time.Duration // for the shop to come to rest; 2 minutes when 0
	Concurrency int           // requests at once; 16 when 0
	Tolerance   time.Duration // by which an order may expire late, since somebody has to notice; 1 minute when 0
	Progress    io.Writer     // for people; may be nil
}

// Violation is one broken promise.
type Violation struct {
	Invariant string `json:"invariant"` // short and stable, such as "stock-balance"
	Entity    string `json:"entity"`    // as the API addresses it, such as "/stock/ENAMEL-MUG"
	Detail    string `json:"detail"`
}

// String is the violation in one line.
func (v Violation) String() string { return v.Invariant + " " + v.Entity + ": " + v.Detail }

// Summary says what was looked at.
type Summary struct {
	Orders    int     `json:"orders"`
	Payments  int     `json:"payments"`
	Shipments int     `json:"shipments"`
	SKUs      int     `json:"skus"`
	Seconds   float64 `json:"seconds"`
}

// ErrNotAtRest says that the shop did not come to rest in time, so that nothing can be said of it.
var ErrNotAtRest = errors.New("the shop did not come to rest")

// Run audits the shop and returns every violation found, in no order that means anything. An error means that it could
// not be audited: it is out of reach, or not at rest within Options.Wait (ErrNotAtRest).
func Run(ctx context.Context, o Options) ([]Violation, Summary, error) {
	began := time.Now()
	o.Wait = cmp.Or(o.Wait, 2*time.Minute)
	o.Concurrency = cmp.Or(o.Concurrency, 16)
	o.Tolerance = cmp.Or(o.Tolerance, time.Minute)
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	client, err := shop.New(o.URL, o.Concurrency)
	if err != nil {
		return nil, Summary{}, err
	}
	defer client.Close()
	client.Patience = min(o.Wait, client.Patience)
	deadline := began.Add(o.Wait)
	for {
		before, open, err := rest(ctx, client, deadline, o.Progress)
		if err != nil {
			return nil, Summary{}, err
		}
		all, err := read(ctx, client, o)
		if err != nil {
			return nil, Summary{}, fmt.Errorf("read the shop: %w", err)
		}
		after, why, err := client.Resting(ctx)
		if err != nil {
			return nil, Summary{}, err
		}
		if why == "" && after.SamePositions(before) {
			all.open = open
			s := Summary{Orders: len(all.orders), Shipments: len(all.shipments), SKUs: len(all.stocks)}
			for _, o := range all.orders {
				if o.payment != nil {
					s.Payments++
				}
			}
			violations := all.check(o.Tolerance)
			s.Seconds = time.Since(began).Round(time.Millisecond).Seconds()
			return violations, s, nil
		}
		// What was read is not of one moment.
		if !time.Now().Before(deadline) {
			return nil, Summary{}, fmt.Errorf("%w: it went on while it was read: %s", ErrNotAtRest, why)
		}
		fmt.Fprintln(o.Progress, "the shop went on while it was read; once more")
	}
}

// rest waits until the shop is at rest, and returns where its read models then stood. Orders that are open while
// nothing moves any more do not keep it waiting beyond the deadline: they are violations.
func rest(ctx context.Context, c *shop.Client, deadline time.Time, progress io.Writer) (shop.Projections, []shop.Order,
	error) {
	said := ""
	for {
		p, why, err := c.Resting(ctx)
		if err != nil {
			return p, nil, err
		}
		late := !time.Now().Before(deadline)
		if why == "" {
			open, err := unsettled(ctx, c)
			if err != nil {
				return p, nil, err
			}
			if len(open) == 0 || late {
				return p, open, nil
			}
			why = fmt.Sprintf("%d orders are open, such as %s (%s)", len(open), open[0].ID, open[0].Status)
		} else if late {
			return p, nil, fmt.Errorf("%w: %s", ErrNotAtRest, why)
		}
		if why != said {
			said = why
			fmt.Fprintf(progress, "waiting: %s\n", why)
		}
		select {
		case <-ctx.Done():
			return p, nil, ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// unsettled is the orders in a state that none stays in by itself.
func unsettled(ctx context.Context, c *shop.Client) ([]shop.Order, error) {
	var open []shop.Order
	for _, status := range []orders.Status{orders.StatusPlaced, orders.StatusStockConfirmed, orders.StatusCancelling} {
		for o, err := range c.Orders(ctx, "", string(status)) {
			if err != nil {
				return nil, err
			}
			open = append(open, o)
		}
	}
	return open, nil
}

// facts is what the API says of one order.
type facts struct {
	shop.Order
	payment  *shop.Payment  // nil: none
	shipment *shop.Shipment // nil: none
	placed   bool           // the history has the event
	deadline time.Time
	decided  time.Time // confirmed or ended, whichever was first; zero: neither, or surely before the deadline
}

// world is what the API says of everything, at one moment.
type world struct {
	open      []shop.Order // orders that wait for something although nothing is under way
	orders    []facts
	stocks    []shop.Stock
	shipments []shop.Shipment
	ledger    []shop.LedgerLine
	sales     []shop.SalesLine
}

func read(ctx context.Context, c *shop.Client, o Options) (world, error) {
	var w world
	collectors := []func() error{
		func() (err error) { w.stocks, err = collect(c.Stocks(ctx)); return },
		func() (err error) { w.shipments, err = collect(c.Shipments(ctx, "")); return },
		func() (err error) { w.ledger, err = collect(c.Ledger(ctx)); return },
		func() (err error) { w.sales, err = collect(c.Sales(ctx)); return },
		func() error {
			listed, err := collect(c.Orders(ctx, "", ""))
			w.orders = make([]facts, len(listed))
			for i := range listed {
				w.orders[i].Order = listed[i]
			}
			return err
		},
	}
	for _, f := range collectors {
		if err := f(); err != nil {
			return w, err
		}
	}
	shipments := make(map[string]*shop.Shipment, len(w.shipments))
	for i := range w.shipments {
		shipments[w.shipments[i].Order] = &w.shipments[i]
	}

	var done atomic.Int64
	narrated, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				fmt.Fprintf(o.Progress, "read %d of %d orders\n", done.Load(), len(w.orders))
			case <-narrated.Done():
				return
			}
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Concurrency)
	for i := range w.orders {
		f := &w.orders[i]
		f.shipment = shipments[f.ID]
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			defer done.Add(1)
			return f.read(ctx, c)
		})
	}
	return w, g.Wait()
}

func collect[T any](items func(func(T, error) bool)) ([]T, error) {
	var all []T
	for item, err := range items {
		if err != nil {
			return nil, err
		}
		all = append(all, item)
	}
	return all, nil
}

// read completes the facts of an order that was listed.
func (f *facts) read(ctx context.Context, c *shop.Client) error {
	full, err := c.Order(ctx, f.ID)
	if err != nil {
		return err
	}
	f.Order = full
	payment, err := c.Payment(ctx, f.ID)
	switch {
	case err == nil:
		f.payment = &payment
	case !shop.IsStatus(err, http.StatusNotFound):
		return err
	}
	return f.readDecision(ctx, c)
}

// readDecision reads no more of the history than it takes: its first event tells the deadline, and an order that was
// last touched before it needs no further look. An order of hundreds of lines has thousands of events.
func (f *facts) readDecision(ctx context.Context, c *shop.Client) error {
	for _, limit := range []int{1, 0} {
		for e, err := range c.History(ctx, f.ID, limit) {
			if shop.IsStatus(err, http.StatusNotFound) {
				return nil // which is a finding
			}
			if err != nil {
				return err
			}
			switch e.Type {
			case orders.Placed{}.EventName():
				var placed struct{ Deadline time.Time }
				if err := json.Unmarshal(e.Data, &placed); err != nil {
					return fmt.Errorf("the history of order %s: %w", f.ID, err)
				}
				f.placed, f.deadline = true, placed.Deadline
			case orders.Confirmed{}.EventName(), orders.Rejected{}.EventName(),
				orders.Cancelled{}.EventName(), orders.Expired{}.EventName():
				if f.decided.IsZero() || e.Time.Before(f.decided) {
					f.decided = e.Time
				}
			}
			if limit == 1 {
				break
			}
		}
		if f.placed && (f.deadline.IsZero() || !f.UpdatedAt.After(f.deadline)) {
			return nil
		}
	}
	return nil
}
