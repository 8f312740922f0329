// Package load answers the question "how does the shop do when it is used?". Run drives Wharf's HTTP API with the
// orders of a file of real invoices, or with made-up ones, until all of them are final, and reports; Customers keeps a
// few made-up customers shopping. Read this file first; file.go says how an order is made of an invoice, customers.go
// makes orders up.
package load

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"wharf/domain/orders"
	"wharf/domain/shipping"
	"wharf/infra/shop"
)

// Options of Run.
type Options struct {
	URL         string        // of the shop
	File        string        // invoices, plain or gzipped; empty: orders are made up
	Stock       int           // per cent of what the orders ask for that is received; 100 is enough for all
	Orders      int           // at most so many; 0: all of the file, or 100 made-up ones
	Concurrency int           // commands at once; 64 when 0
	ReadBack    bool          // every order that was placed is read with the token of its placing
	Patience    time.Duration // gives up when nothing moves for so long; 2 minutes when 0
	Progress    io.Writer     // progress and rows that cannot be read, for people; may be nil
}

// Report is what became of the orders. Placed, Delivered, Rejected, Cancelled and Expired count this run's orders as
// they stood in the end, Confirmed those that were confirmed at some time.
type Report struct {
	Placed          int     `json:"placed"`
	Confirmed       int     `json:"confirmed"`
	Delivered       int     `json:"delivered"`
	Rejected        int     `json:"rejected"`
	Cancelled       int     `json:"cancelled"`
	Expired         int     `json:"expired"`
	LinesLeftOut    int     `json:"lines_left_out"`
	InvoicesSkipped int     `json:"invoices_skipped"`
	ReadBack        int     `json:"read_back"`      // orders that were read with their token
	StaleReads      int     `json:"stale_reads"`    // of these, those that the answer did not know
	CommandsPerS    float64 `json:"commands_per_s"` // from the first command sent to the last answered
	P50             float64 `json:"p50_ms"`         // of one command with all its tries
	P99             float64 `json:"p99_ms"`
}

// String is the report as a table.
func (r Report) String() string {
	var b strings.Builder
	row := func(name string, value any) { fmt.Fprintf(&b, "%-16s %10v\n", name, value) }
	row("placed", r.Placed)
	row("confirmed", r.Confirmed)
	row("delivered", r.Delivered)
	row("rejected", r.Rejected)
	row("cancelled", r.Cancelled)
	row("expired", r.Expired)
	row("lines_left_out", r.LinesLeftOut)
	row("invoices_skipped", r.InvoicesSkipped)
	row("read_back", r.ReadBack)
	row("stale_reads", r.StaleReads)
	row("commands_per_s", r.CommandsPerS)
	row("p50_ms", r.P50)
	row("p99_ms", r.P99)
	return b.String()
}

// order is one order to be placed.
type order struct {
	key      string // its Idempotency-Key
	name     string // for people
	customer string
	lines    []orders.Line
	cancel   bool // it is cancelled once it is placed
}

// run is the state of one Run.
type run struct {
	client   *shop.Client
	progress io.Writer
	patience time.Duration
	name     string // of the run, where its orders are made up
	orders   []order

	readBack bool

	delivered, read, stale atomic.Int64

	mu      sync.Mutex
	ours    map[string]*order // by the id that the shop gave
	refused int               // orders that the shop would not take
	took    []time.Duration   // of every command
	from    time.Time         // the first command was sent
	to      time.Time         // the last one was answered
}

// Run places the orders, dispatches and delivers each as soon as it is confirmed, and returns when all of them are
// final and the shop is at rest. Before that it takes in the stock they need. A rejected order is no error. Every
// command's Idempotency-Key comes from the file (the invoice's number, the SKU and its quantity), so a second run of
// the same file changes nothing. When ctx ends, or nothing moves for Options.Patience, it returns what it knows, and an
// error.
func Run(ctx context.Context, o Options) (Report, error) {
	o.Concurrency = cmp.Or(o.Concurrency, 64)
	o.Patience = cmp.Or(o.Patience, 2*time.Minute)
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Stock < 0 || o.Orders < 0 || o.Concurrency < 1 {
		return Report{}, errors.New("stock, orders and concurrency must not be negative")
	}
	client, err := shop.New(o.URL, o.Concurrency+2)
	if err != nil {
		return Report{}, err
	}
	defer client.Close()
	client.Patience = o.Patience
	r := &run{client: client, progress: &lines{w: o.Progress}, patience: o.Patience, readBack: o.ReadBack, ours: map[string]*order{}}

	var report Report
	if o.File == "" {
		r.name = uuid.NewString()
		r.orders = makeUp(r.name, cmp.Or(o.Orders, 100))
	} else {
		f, err := readFile(o.File, func(line int, err error) { r.say("line %d skipped: %v", line, err) })
		if err != nil {
			return report, fmt.Errorf("read %s: %w", o.File, err)
		}
		r.orders = f.choose(o.Orders, &report, r.say)
		r.say("%d orders to place, %d lines left out, %d invoices skipped",
			len(r.orders), report.LinesLeftOut, report.InvoicesSkipped)
	}
	if err := r.knock(ctx); err != nil {
		return report, err
	}
	err = r.all(ctx, o, &report)
	r.measure(&report)
	if ctx.Err() != nil {
		err = ctx.Err() // whatever failed because of it
	}
	return report, err
}

// knock finds out quickly that there is no shop, where every later call would be patient.
func (r *run) knock(ctx context.Context) error {
	c := *r.client
	c.Patience = min(c.Patience, 10*time.Second)
	if _, err := c.Projections(ctx); err != nil {
		return fmt.Errorf("the shop does not answer: %w", err)
	}
	return nil
}

func (r *run) all(ctx context.Context, o Options, report *Report) error {
	stop := r.narrate(ctx)
	defer stop()
	if err := r.receive(ctx, o.Stock, o.Concurrency); err != nil {
		return err
	}
	r.say("stock received")

	// Shipping goes before placing, so that what is begun gets done and the lists to look through stay short.
	placing, shipping := make(chan func(context.Context) error), make(chan func(context.Context) error)
	g, ctx := errgroup.WithContext(ctx)
	ctx, done := context.WithCancel(ctx)
	defer done()
	var left sync.WaitGroup // orders to place
	left.Add(len(r.orders))
	for range o.Concurrency {
		g.Go(func() error { return work(ctx, shipping, placing) })
	}
	g.Go(func() error {
		for i := range r.orders {
			select {
			case placing <- func(ctx context.Context) error { defer left.Done(); return r.place(ctx, &r.orders[i]) }:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		left.Wait()
		defer done()
		return r.finish(ctx, report)
	})
	g.Go(func() error { return r.ship(ctx, shipping) })
	return g.Wait()
}

// work does jobs until ctx ends, the first channel's before the second's.
func work(ctx context.Context, first, second <-chan func(context.Context) error) error {
	for {
		var job func(context.Context) error
		select {
		case job = <-first:
		default:
			select {
			case job = <-first:
			case job = <-second:
			case <-ctx.Done():
				return nil
			}
		}
		if err := job(ctx); err != nil {
			return err
		}
	}
}

// timed does a command and notes how long it took.
func (r *run) timed(f func() (shop.Receipt, error)) (shop.Receipt, error) {
	from := time.Now()
	receipt, err := f()
	if err == nil || refused(err) {
		to := time.Now()
		r.mu.Lock()
		if r.from.IsZero() || from.Before(r.from) {
			r.from = from
		}
		if to.After(r.to) {
			r.to = to
		}
		r.took = append(r.took, to.Sub(from))
		r.mu.Unlock()
	}
	return receipt, err
}

// refused says that the shop has answered, and that the answer is no.
func refused(err error) bool {
	var p *shop.Problem
	return errors.As(err, &p) && p.Status >= 400 && p.Status < 500 && !p.Passing()
}

// maxReceive is how many units one command takes in at most.
const maxReceive = 1_000_000

// receive takes in the percentage of what the orders ask for, SKUs side by side.
func (r *run) receive(ctx context.Context, percent, concurrency int) error {
	var all []orders.Line
	for _, o := range r.orders {
		all = append(all, o.lines...)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(concurrency)
	for _, item := range orders.Items(all) {
		if item.Quantity > math.MaxInt64/int64(max(percent, 1))-100 {
			return fmt.Errorf("the orders ask for too many units of %q", item.SKU)
		}
		quantity := (item.Quantity*int64(percent) + 99) / 100
		g.Go(func() error {
			for part := 0; quantity > 0; part++ {
				n := min(quantity, maxReceive)
				// A key is visible ASCII, which a SKU need not be.
				key := uuid.NewSHA1(keys, fmt.Appendf(nil, "%sreceive %d+%d %s", r.name, quantity, part, item.SKU)).String()
				_, err := r.timed(func() (shop.Receipt, error) { return r.client.Receive(ctx, key, item.SKU, n) })
				if refused(err) { // the rest of the load does not depend on it
					r.say("stock was not taken in: %v", err)
					return nil
				}
				if err != nil {
					return fmt.Errorf("receive stock: %w", err)
				}
				quantity -= n
			}
			return nil
		})
	}
	return g.Wait()
}

// keys is the namespace of Idempotency-Keys that are hashes.
var keys = uuid.MustParse("6f0b64a5-2a3c-4a0e-9a52-8d1f6c0f3b7e")

func (r *run) place(ctx context.Context, o *order) error {
	receipt, err := r.timed(func() (shop.Receipt, error) {
		return r.client.Place(ctx, o.key, shop.NewOrder{Customer: o.customer, Lines: o.lines})
	})
	if refused(err) {
		r.say("%s was not taken: %v", o.name, err)
		r.mu.Lock()
		r.refused++
		r.mu.Unlock()
		return nil
	}
	if err != nil {
		return fmt.Errorf("place %s: %w", o.name, err)
	}
	if r.readBack {
		if err := r.check(ctx, receipt); err != nil {
			return fmt.Errorf("read %s back: %w", o.name, err)
		}
	}
	if o.cancel {
		_, err := r.timed(func() (shop.Receipt, error) {
			return r.client.Cancel(ctx, "cancel-"+receipt.ID, receipt.ID, "changed my mind")
		})
		if refused(err) { // it may have been rejected meanwhile
			r.say("%s was not cancelled: %v", receipt.ID, err)
		} else if err != nil {
			return fmt.Errorf("cancel %s: %w", o.name, err)
		}
	}
	r.mu.Lock()
	r.ours[receipt.ID] = o
	r.mu.Unlock()
	return nil
}

// check reads what was just written: an answer that does not know it is stale.
func (r *run) check(ctx context.Context, receipt shop.Receipt) error {
	order, err := r.client.OrderSince(ctx, receipt.ID, receipt.Token)
	if err != nil && !shop.IsStatus(err, http.StatusNotFound) {
		return err
	}
	r.read.Add(1)
	if err != nil || order.Version < receipt.Version {
		r.stale.Add(1)
		r.say("a stale answer: order %s has version %d, not %d", receipt.ID, order.Version, receipt.Version)
	}
	return nil
}

// ship looks for our shipments and hands them to the workers, until ctx ends. Dispatched ones are looked for only when
// no created one is left: they are what an interrupted run has left behind.
func (r *run) ship(ctx context.Context, jobs chan<- func(context.Context) error) error {
	seen := map[string]bool{}
	for {
		found := 0
		for _, status := range []shipping.Status{shipping.StatusCreated, shipping.StatusDispatched} {
			if found > 0 {
				break
			}
			for s, err := range r.client.Shipments(ctx, string(status)) {
				if ctx.Err() != nil {
					return nil
				}
				if err != nil {
					return fmt.Errorf("look for shipments: %w", err)
				}
				r.mu.Lock()
				o := r.ours[s.Order]
				r.mu.Unlock()
				if o == nil || o.cancel || seen[s.Order] {
					continue
				}
				seen[s.Order] = true
				found++
				select {
				case jobs <- func(ctx context.Context) error { return r.dispatchAndDeliver(ctx, s.Order, o) }:
				case <-ctx.Done():
					return nil
				}
			}
		}
		pause := 100 * time.Millisecond
		if found == 0 {
			pause = 300 * time.Millisecond
		}
		if sleep(ctx, pause) != nil {
			return nil
		}
	}
}

func (r *run) dispatchAndDeliver(ctx context.Context, id string, o *order) error {
	_, err := r.timed(func() (shop.Receipt, error) {
		return r.client.Dispatch(ctx, "dispatch-"+id, id, "Wharf Carriers", "WC-"+id)
	})
	// A refusal is no failure: somebody else has cancelled it, or sent it off in his own way.
	if refused(err) {
		r.say("%s was not dispatched: %v", id, err)
	} else if err != nil {
		return fmt.Errorf("dispatch %s: %w", o.name, err)
	}
	_, err = r.timed(func() (shop.Receipt, error) { return r.client.Deliver(ctx, "deliver-"+id, id) })
	if refused(err) {
		r.say("%s was not delivered: %v", id, err)
	} else if err != nil {
		return fmt.Errorf("deliver %s: %w", o.name, err)
	}
	if err == nil {
		r.delivered.Add(1)
	}
	return nil
}

// lookAgain is when the orders are looked through although the shop is not at rest. It may never be, when other people
// keep buying.
const lookAgain = 15 * time.Second

// finish returns when every order is final and the shop is at rest. The orders are only looked through when the shop
// seems to be at rest, or has not been for a while: they are a long list.
func (r *run) finish(ctx context.Context, report *Report) error {
	final := false
	open, first := math.MaxInt, ""
	var done int
	backlog := int64(math.MaxInt64)
	moved, looked := time.Now(), time.Now()
	for said := ""; ; {
		p, why, err := r.client.Resting(ctx)
		if err != nil {
			return err
		}
		if final && p.Busy() == "" { // other people's orders may go on
			return nil
		}
		if !final && (why == "" || time.Since(looked) > lookAgain) {
			before := open
			if open, first, err = r.count(ctx, report); err != nil {
				return err
			}
			looked = time.Now()
			if open < before {
				moved = looked
			}
			if final = open == 0; final {
				continue // what the last ones have set off may still be under way
			}
		}
		if first != "" && open > 0 {
			why = strings.TrimSuffix(fmt.Sprintf("%d orders are not final, such as %s; %s", open, first, why), "; ")
		}
		r.mu.Lock()
		commands := len(r.took)
		r.mu.Unlock()
		if commands > done || p.Backlog() < backlog {
			done, backlog, moved = commands, min(backlog, p.Backlog()), time.Now()
		}
		if time.Since(moved) > r.patience {
			return fmt.Errorf("gave up, nothing has moved for %s: %s", r.patience, why)
		}
		if why != said && time.Since(moved) > 5*time.Second {
			said = why
			r.say("waiting: %s", why)
		}
		if err := sleep(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
}

// count looks at the status of each of our orders, and says how many are not final, and names one. All of them have
// been placed, so nobody writes to ours any more.
func (r *run) count(ctx context.Context, report *Report) (open int, first string, err error) {
	n := Report{Placed: len(r.ours)}
	counted := make(map[string]bool, len(r.ours))
	for o, err := range r.client.Orders(ctx, "", "") {
		if err != nil {
			return 0, "", err
		}
		if len(counted) == len(r.ours) {
			break
		}
		if r.ours[o.ID] == nil || counted[o.ID] {
			continue
		}
		counted[o.ID] = true
		switch o.Status {
		case orders.StatusDelivered:
			n.Delivered++
			n.Confirmed++
		case orders.StatusRejected:
			n.Rejected++
		case orders.StatusExpired:
			n.Expired++
		case orders.StatusCancelled:
			n.Cancelled++
			if o.Shipment.Status != "" { // only a confirmed order has one
				n.Confirmed++
			}
		default:
			open++
			first = fmt.Sprintf("%s (%s)", o.ID, o.Status)
			if o.Status != orders.StatusPlaced && o.Status != orders.StatusStockConfirmed {
				n.Confirmed++
			}
		}
	}
	if missing := len(r.ours) - len(counted); missing > 0 {
		open += missing
		first = cmp.Or(first, "one that GET /orders does not list")
	}
	report.Placed, report.Confirmed, report.Delivered = n.Placed, n.Confirmed, n.Delivered
	report.Rejected, report.Cancelled, report.Expired = n.Rejected, n.Cancelled, n.Expired
	return open, first, nil
}

// measure fills in the figures of the commands.
func (r *run) measure(report *Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	report.Placed = len(r.ours)
	report.InvoicesSkipped += r.refused
	report.ReadBack, report.StaleReads = int(r.read.Load()), int(r.stale.Load())
	if len(r.took) == 0 {
		return
	}
	slices.Sort(r.took)
	quantile := func(q float64) float64 {
		i := int(math.Ceil(q*float64(len(r.took)))) - 1
		return math.Round(float64(r.took[i].Microseconds())/10) / 100
	}
	report.P50, report.P99 = quantile(0.50), quantile(0.99)
	if s := r.to.Sub(r.from).Seconds(); s > 0 {
		report.CommandsPerS = math.Round(float64(len(r.took))/s*10) / 10
	}
}

// narrate says every few seconds how far it is, until stop is called.
func (r *run) narrate(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for last, lastAt := 0, time.Now(); sleep(ctx, 2*time.Second) == nil; {
			r.mu.Lock()
			placed, commands := len(r.ours), len(r.took)
			r.mu.Unlock()
			if commands == last {
				continue
			}
			rate := float64(commands-last) / time.Since(lastAt).Seconds()
			r.say("placed %d of %d, delivered %d, %.0f commands/s", placed, len(r.orders), r.delivered.Load(), rate)
			last, lastAt = commands, time.Now()
		}
	}()
	return func() { cancel(); <-done }
}

func (r *run) say(format string, args ...any) { fmt.Fprintf(r.progress, format+"\n", args...) }

// lines lets several goroutines write whole lines. A progress line that cannot be written is no reason to stop.
type lines struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
