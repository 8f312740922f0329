package load

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/infra/shop"
)

// catalogue is what made-up customers buy, at fixed prices.
var catalogue = []orders.Line{
	{SKU: "ANCHOR-LAMP", UnitPrice: domain.Money{Amount: 2499, Currency: currency}},
	{SKU: "BOLLARD-STOOL", UnitPrice: domain.Money{Amount: 4950, Currency: currency}},
	{SKU: "BRASS-BELL", UnitPrice: domain.Money{Amount: 1295, Currency: currency}},
	{SKU: "CANVAS-BAG", UnitPrice: domain.Money{Amount: 850, Currency: currency}},
	{SKU: "CHART-PRINT", UnitPrice: domain.Money{Amount: 1600, Currency: currency}},
	{SKU: "DECK-CHAIR", UnitPrice: domain.Money{Amount: 3999, Currency: currency}},
	{SKU: "ENAMEL-MUG", UnitPrice: domain.Money{Amount: 595, Currency: currency}},
	{SKU: "GULL-MOBILE", UnitPrice: domain.Money{Amount: 1125, Currency: currency}},
	{SKU: "OILSKIN-HAT", UnitPrice: domain.Money{Amount: 2250, Currency: currency}},
	{SKU: "ROPE-MAT", UnitPrice: domain.Money{Amount: 1875, Currency: currency}},
	{SKU: "SIGNAL-FLAG", UnitPrice: domain.Money{Amount: 725, Currency: currency}},
	{SKU: "TIDE-CLOCK", UnitPrice: domain.Money{Amount: 6400, Currency: currency}},
}

// lowStock is when Customers takes in more of a SKU, and how much more; in units.
const lowStock, moreStock = 100, 500

// One in cancelOneIn made-up orders is cancelled.
const cancelOneIn = 10

// makeUp makes n orders up, whose keys begin with prefix.
func makeUp(prefix string, n int) []order {
	made := make([]order, n)
	for i := range made {
		picks := rand.Perm(len(catalogue))[:1+rand.IntN(5)]
		lines := make([]orders.Line, len(picks))
		for j, pick := range picks {
			lines[j] = catalogue[pick]
			lines[j].Quantity = 1 + rand.Int64N(4)
		}
		made[i] = order{
			key: fmt.Sprintf("%s-%d", prefix, i), name: fmt.Sprintf("made-up order %d", i+1),
			customer: fmt.Sprintf("customer-%03d", 1+rand.IntN(200)),
			lines:    lines, cancel: rand.IntN(cancelOneIn) == 0,
		}
	}
	return made
}

// Customers keeps n made-up customers shopping at a gentle pace, and the shelves full enough for them, until ctx ends
// and all of them have left. What goes wrong is logged, and tried again with the next order.
func Customers(ctx context.Context, url string, n int, log *slog.Logger) error {
	client, err := shop.New(url, n+1)
	if err != nil {
		return err
	}
	defer client.Close()
	var all sync.WaitGroup
	repeat := func(what string, once func(context.Context, *shop.Client) error, pause time.Duration) {
		all.Go(func() {
			for ctx.Err() == nil {
				if err := once(ctx, client); err != nil && ctx.Err() == nil {
					log.Warn(what+" failed", "error", err)
				}
				_ = sleep(ctx, pause/2+rand.N(pause)) // the loop looks at ctx itself
			}
		})
	}
	if n > 0 {
		repeat("taking in stock", restock, 2*time.Second)
	}
	for range n {
		repeat("shopping", visit, time.Second)
	}
	all.Wait()
	return nil
}

// restock takes in more of what is running low.
func restock(ctx context.Context, c *shop.Client) error {
	for _, item := range catalogue {
		s, err := c.Stock(ctx, item.SKU)
		if err != nil && !shop.IsStatus(err, http.StatusNotFound) {
			return err
		}
		if s.Available >= lowStock {
			continue
		}
		if _, err := c.Receive(ctx, uuid.NewString(), item.SKU, moreStock); err != nil {
			return err
		}
	}
	return nil
}

// visit is one customer's visit: an order that is placed, perhaps cancelled, and else sent off once it is confirmed.
func visit(ctx context.Context, c *shop.Client) error {
	o := makeUp(uuid.NewString(), 1)[0]
	placed, err := c.Place(ctx, o.key, shop.NewOrder{Customer: o.customer, Lines: o.lines})
	if err != nil {
		return err
	}
	if o.cancel {
		_, err := c.Cancel(ctx, "cancel-"+placed.ID, placed.ID, "changed my mind")
		return unlessRefused(err)
	}
	for {
		if err := sleep(ctx, 300*time.Millisecond+rand.N(300*time.Millisecond)); err != nil {
			return err
		}
		now, err := c.Order(ctx, placed.ID)
		if shop.IsStatus(err, http.StatusNotFound) {
			continue // the read model has not heard of it yet
		}
		if err != nil {
			return err
		}
		switch now.Status {
		case orders.StatusPlaced, orders.StatusStockConfirmed:
			continue
		case orders.StatusConfirmed:
			if now.Shipment.Status == "" {
				continue // it is being made
			}
		default:
			return nil // it ended without us
		}
		break
	}
	if _, err := c.Dispatch(ctx, "dispatch-"+placed.ID, placed.ID, "Wharf Carriers", "WC-"+placed.ID); err != nil {
		return unlessRefused(err)
	}
	if err := sleep(ctx, rand.N(time.Second)); err != nil {
		return err
	}
	_, err = c.Deliver(ctx, "deliver-"+placed.ID, placed.ID)
	return unlessRefused(err)
}

// unlessRefused passes over a refusal: somebody else was quicker.
func unlessRefused(err error) error {
	if refused(err) {
		return nil
	}
	return err
}
