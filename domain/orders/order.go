// Package orders answers the question "what can happen to an order?". The Order aggregate is the process manager of
// the whole shop: it hears of stock, payment and shipment, and decides what comes next. Read this file first: Evolve
// folds a fact into the state, each Decide method turns a wish and the state into facts.
package orders

import (
	"cmp"
	"slices"
	"time"

	"wharf/domain"
)

// Status is where an order stands. Its values are what the HTTP API shows.
type Status string

// The life of an order: the first four are open, the others are endings (Shipped still awaits its delivery).
const (
	StatusPlaced         Status = "placed"
	StatusStockConfirmed Status = "stock_confirmed"
	StatusConfirmed      Status = "confirmed"
	StatusCancelling     Status = "cancelling"
	StatusShipped        Status = "shipped"
	StatusDelivered      Status = "delivered"
	StatusRejected       Status = "rejected"
	StatusCancelled      Status = "cancelled"
	StatusExpired        Status = "expired"
)

// Order is the state that decisions need. The zero value is an order that was never placed.
type Order struct {
	Status Status
	life   *life // nil before and after it, but for a cancelled order, which keeps the reason
}

// life is what an order needs until it ends; most have. It is replaced, never changed.
type life struct {
	reason   string // of a cancellation (asked for or done)
	total    domain.Money
	deadline time.Time
	items    []domain.Quantity // sorted by SKU
	reserved bitset            // which of items are reserved
	missing  int               // how many are not
}

// Evolve is the order after one more fact. The facts are what they are: it never refuses one. The receiver stays as
// it was, so a decision may be tried on a copy.
func (o Order) Evolve(event domain.Event) Order {
	switch e := event.(type) {
	case Placed:
		return Order{Status: StatusPlaced, life: &life{total: e.Total, deadline: e.Deadline, items: e.Items, missing: len(e.Items)}}
	case ItemReserved:
		if l := o.lived(); l.awaits(e.SKU) {
			i, _ := l.item(e.SKU)
			l.reserved = l.reserved.with(i, len(l.items))
			l.missing--
			o.life = &l
		}
	case StockConfirmed:
		l := o.lived()
		l.reserved = nil
		o.Status, o.life = StatusStockConfirmed, &l
	case Confirmed:
		o.Status = StatusConfirmed
	case CancellationRequested:
		l := o.lived()
		l.reason = e.Reason
		o.Status, o.life = StatusCancelling, &l
	case Shipped:
		o.Status = StatusShipped
	case Delivered:
		return Order{Status: StatusDelivered}
	case Rejected:
		return Order{Status: StatusRejected}
	case Cancelled:
		return Order{Status: StatusCancelled, life: &life{reason: e.Reason}}
	case Expired:
		return Order{Status: StatusExpired}
	}
	return o
}

// Closed says that nothing can happen to the order any more.
func (o Order) Closed() bool {
	switch o.Status {
	case StatusDelivered, StatusRejected, StatusCancelled, StatusExpired:
		return true
	}
	return false
}

// Due is when the order expires, and false when it no longer can.
func (o Order) Due() (time.Time, bool) { return o.lived().deadline, o.awaitsConfirmation() }

// lived is the order's life, with nothing in it when there is none: facts may come in any order.
func (o Order) lived() life {
	if o.life == nil {
		return life{}
	}
	return *o.life
}

func (o Order) awaitsConfirmation() bool {
	return o.Status == StatusPlaced || o.Status == StatusStockConfirmed
}

// DecidePlace places the order, if its lines have a Total.
func (o Order) DecidePlace(customer string, lines []Line, deadline time.Time) ([]domain.Event, error) {
	if o.Status != "" {
		return nil, domain.Refuse("order-already-placed", "an order with this id was placed already")
	}
	total, err := Total(lines)
	if err != nil {
		return nil, err
	}
	return []domain.Event{Placed{customer, lines, Items(lines), total, deadline}}, nil
}

// DecideItemReserved hears that inventory holds one SKU for the order; the last one confirms the stock.
func (o Order) DecideItemReserved(sku string) ([]domain.Event, error) {
	l := o.lived()
	if o.Status != StatusPlaced || !l.awaits(sku) {
		return nil, nil
	}
	events := []domain.Event{ItemReserved{sku}}
	if l.missing == 1 {
		events = append(events, StockConfirmed{l.total})
	}
	return events, nil
}

// DecideReject hears that stock or payment was refused.
func (o Order) DecideReject(reason string) ([]domain.Event, error) {
	if !o.awaitsConfirmation() {
		return nil, nil
	}
	return []domain.Event{Rejected{reason, o.lived().items}}, nil
}

// DecideConfirm hears that the payment is authorised. An order that ended meanwhile stays as it is: its ending made
// payments void the authorisation.
func (o Order) DecideConfirm() ([]domain.Event, error) {
	if o.Status != StatusStockConfirmed {
		return nil, nil
	}
	return []domain.Event{Confirmed{o.lived().items}}, nil
}

// DecideCancel cancels at once before the order is confirmed; after that it asks the shipment, which alone knows
// whether it has left.
func (o Order) DecideCancel(reason string) ([]domain.Event, error) {
	switch o.Status {
	case "":
		return nil, domain.ErrUnknown
	case StatusPlaced, StatusStockConfirmed:
		return []domain.Event{Cancelled{reason, o.lived().items}}, nil
	case StatusConfirmed:
		return []domain.Event{CancellationRequested{reason}}, nil
	case StatusCancelling, StatusCancelled:
		if o.lived().reason != reason {
			return nil, domain.Refuse("order-cancelled-otherwise", "the order was cancelled with another reason")
		}
		return nil, nil
	}
	return nil, domain.Refuse("order-"+string(o.Status), "the order is "+string(o.Status)+" and can no longer be cancelled")
}

// DecideCancelled hears that the shipment gave way to the cancellation.
func (o Order) DecideCancelled() ([]domain.Event, error) {
	if o.Status != StatusCancelling {
		return nil, nil
	}
	return []domain.Event{Cancelled{o.lived().reason, o.lived().items}}, nil
}

// DecideExpire ends an order that was not confirmed in time. Before its deadline it does nothing.
func (o Order) DecideExpire(now time.Time) ([]domain.Event, error) {
	if !o.awaitsConfirmation() || now.Before(o.lived().deadline) {
		return nil, nil
	}
	return []domain.Event{Expired{"not confirmed in time", o.lived().items}}, nil
}

// DecideShipped hears that the shipment was dispatched. It wins over a cancellation that was still being asked for.
func (o Order) DecideShipped(carrier, tracking string) ([]domain.Event, error) {
	if o.Status != StatusConfirmed && o.Status != StatusCancelling {
		return nil, nil
	}
	return []domain.Event{Shipped{carrier, tracking, o.lived().items, o.lived().total}}, nil
}

// DecideDelivered hears that the shipment arrived.
func (o Order) DecideDelivered() ([]domain.Event, error) {
	if o.Status != StatusShipped {
		return nil, nil
	}
	return []domain.Event{Delivered{o.lived().items}}, nil
}

// awaits says that the order has the SKU and it is not reserved yet.
func (l life) awaits(sku string) bool {
	i, found := l.item(sku)
	return found && !l.reserved.has(i)
}

func (l life) item(sku string) (int, bool) {
	return slices.BinarySearchFunc(l.items, sku, func(q domain.Quantity, sku string) int { return cmp.Compare(q.SKU, sku) })
}

// Total is the sum of the lines: an error when their currencies differ or it does not fit.
func Total(lines []Line) (domain.Money, error) {
	total := domain.Money{}
	for i, l := range lines {
		if i == 0 {
			total.Currency = l.UnitPrice.Currency
		} else if l.UnitPrice.Currency != total.Currency {
			return domain.Money{}, domain.Refuse("mixed-currencies", "every line must be in the currency of the first")
		}
		price, err := l.UnitPrice.Times(l.Quantity)
		if err != nil {
			return domain.Money{}, err
		}
		if total, err = total.Plus(price); err != nil {
			return domain.Money{}, err
		}
	}
	return total, nil
}

// Items is the quantities of the lines, summed per SKU and sorted by it.
func Items(lines []Line) []domain.Quantity {
	sum := make(map[string]int64, len(lines))
	for _, l := range lines {
		sum[l.SKU] += l.Quantity
	}
	items := make([]domain.Quantity, 0, len(sum))
	for sku, n := range sum {
		items = append(items, domain.Quantity{SKU: sku, Quantity: n})
	}
	slices.SortFunc(items, func(a, b domain.Quantity) int { return cmp.Compare(a.SKU, b.SKU) })
	return items
}

// bitset is an immutable set of small numbers: 2,000 lines fit into 250 bytes.
type bitset []uint64

func (b bitset) has(i int) bool { return i/64 < len(b) && b[i/64]&(1<<(i%64)) != 0 }

func (b bitset) with(i, size int) bitset {
	c := make(bitset, (size+63)/64)
	copy(c, b)
	c[i/64] |= 1 << (i % 64)
	return c
}
