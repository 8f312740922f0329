package audit

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
	"wharf/infra/shop"
)

// check checks every invariant:
//
//	at-rest             no order is placed, stock_confirmed or cancelling, no payment waits for the provider
//	stock-balance       of each SKU, received + adjusted = available + reserved + shipped
//	stock-negative      none of them is negative, but adjusted
//	stock-reserved      what is reserved of each SKU is what the open orders ask for
//	stock-shipped       what is shipped of each SKU is what the shipped and delivered orders asked for
//	order-total         an order's total is the sum of its lines
//	order-deadline      it was confirmed, or ended, within its deadline
//	order-payment       it tells of its payment what the payment tells
//	order-shipment      it tells of its shipment what the shipment tells, and both agree on how far it is
//	paid                a confirmed order is authorised in full; nothing ships unpaid
//	no-charge           an order that was cancelled or rejected, or expired, holds and keeps no money
//	payment-amounts     authorised >= captured >= refunded >= 0, refunds under way included
//	payment-capture     an order is captured at most once, and the sums of the movements are the payment's
//	posting-balance     the postings of each movement sum to zero
//	ledger-balance      each account holds the sum of its postings
//	ledger-sum          the ledger sums to zero in each currency
//	sales               revenue is what was captured less what was refunded, orders and units those that left, in
//	                    each currency
func (w world) check(tolerance time.Duration) []Violation {
	a := &findings{}
	for _, o := range w.open {
		a.add("at-rest", orderAt(o.ID), "it is %s, and nothing is under way that could change that", o.Status)
	}
	w.checkStock(a)
	for _, o := range w.orders {
		o.checkOrder(a, tolerance)
		o.checkShipment(a)
		o.checkPayment(a)
	}
	known := map[string]bool{}
	for _, o := range w.orders {
		known[o.ID] = true
	}
	for _, s := range w.shipments {
		if !known[s.Order] {
			a.add("order-shipment", "/shipments/"+s.Order, "there is no such order")
		}
	}
	w.checkMoney(a)
	return a.violations
}

type findings struct{ violations []Violation }

func (f *findings) add(invariant, entity, format string, args ...any) {
	f.violations = append(f.violations, Violation{invariant, entity, fmt.Sprintf(format, args...)})
}

func orderAt(id string) string   { return "/orders/" + id }
func paymentAt(id string) string { return "/payments/" + id }

func (w world) checkStock(a *findings) {
	reserved, shipped := map[string]int64{}, map[string]int64{}
	stocks := map[string]shop.Stock{}
	for _, s := range w.stocks {
		stocks[s.SKU] = s
	}
	for _, o := range w.orders {
		var sum map[string]int64
		switch o.Status {
		case orders.StatusConfirmed, orders.StatusCancelling:
			sum = reserved
		case orders.StatusShipped, orders.StatusDelivered:
			sum = shipped
		default: // placed and stock_confirmed ones are violations already, and may hold any part of their items
			continue
		}
		for _, item := range orders.Items(o.Lines) {
			sum[item.SKU] += item.Quantity
			if _, known := stocks[item.SKU]; !known {
				stocks[item.SKU] = shop.Stock{SKU: item.SKU}
			}
		}
	}
	for _, sku := range slices.Sorted(maps.Keys(stocks)) {
		s, at := stocks[sku], "/stock/"+sku
		if s.Received+s.Adjusted != s.Available+s.Reserved+s.Shipped {
			a.add("stock-balance", at, "received %d + adjusted %d is not available %d + reserved %d + shipped %d",
				s.Received, s.Adjusted, s.Available, s.Reserved, s.Shipped)
		}
		if min(s.Received, s.Available, s.Reserved, s.Shipped) < 0 {
			a.add("stock-negative", at, "received %d, available %d, reserved %d, shipped %d",
				s.Received, s.Available, s.Reserved, s.Shipped)
		}
		if s.Reserved != reserved[sku] && len(w.open) == 0 {
			a.add("stock-reserved", at, "%d are reserved, the open orders ask for %d", s.Reserved, reserved[sku])
		}
		if s.Shipped != shipped[sku] {
			a.add("stock-shipped", at, "%d are shipped, the shipped orders asked for %d", s.Shipped, shipped[sku])
		}
	}
}

func (o facts) checkOrder(a *findings, tolerance time.Duration) {
	total, err := orders.Total(o.Lines)
	if err != nil {
		a.add("order-total", orderAt(o.ID), "its lines have no sum: %v", err)
	} else if len(o.Lines) == 0 || total != o.Total {
		a.add("order-total", orderAt(o.ID), "its total is %s, the sum of its %d lines %s",
			money(o.Total), len(o.Lines), money(total))
	}
	switch late := o.decided.Sub(o.deadline); {
	case !o.placed:
		a.add("order-deadline", orderAt(o.ID), "its history does not tell that it was placed")
	case !o.deadline.IsZero() && late > tolerance:
		a.add("order-deadline", orderAt(o.ID), "it was confirmed, or ended, %s after its deadline", late)
	case !o.deadline.IsZero() && o.decided.IsZero() && o.UpdatedAt.After(o.deadline):
		a.add("order-deadline", orderAt(o.ID), "its history tells of no confirmation and no ending")
	}
}

// shipmentFor is how far an order's shipment is when the order is at rest; empty: none.
var shipmentFor = map[orders.Status][]shipping.Status{
	orders.StatusConfirmed: {shipping.StatusCreated},
	orders.StatusShipped:   {shipping.StatusDispatched},
	orders.StatusDelivered: {shipping.StatusDelivered},
	orders.StatusRejected:  {""},
	orders.StatusExpired:   {""},
	orders.StatusCancelled: {"", shipping.StatusCancelled}, // before or after it was confirmed
}

func (o facts) checkShipment(a *findings) {
	var told shop.Part
	if o.shipment != nil {
		told = shop.Part{Status: o.shipment.Status, Version: o.shipment.Version}
	}
	if o.Shipment != told {
		a.add("order-shipment", orderAt(o.ID), "it says its shipment is %s, the shipment says %s",
			part(o.Shipment), part(told))
	}
	if want, settled := shipmentFor[o.Status]; settled && !slices.Contains(want, shipping.Status(told.Status)) {
		a.add("order-shipment", orderAt(o.ID), "it is %s, its shipment %s", o.Status, part(told))
	}
}

func (o facts) checkPayment(a *findings) {
	var p shop.Payment
	if o.payment != nil {
		p = *o.payment
	}
	told := shop.Part{Status: string(p.Status), Version: p.Version}
	if o.Payment != told {
		a.add("order-payment", orderAt(o.ID), "it says its payment is %s, the payment says %s", part(o.Payment), part(told))
	}
	switch p.Status {
	case payments.StatusAuthorizing, payments.StatusCapturing, payments.StatusVoiding:
		a.add("at-rest", paymentAt(o.ID), "it is %s, and nothing is under way that could change that", p.Status)
	}
	if p.Pending.Amount != 0 {
		a.add("at-rest", paymentAt(o.ID), "a refund is pending, and nothing is under way that could change that")
	}

	switch o.Status {
	case orders.StatusConfirmed, orders.StatusShipped, orders.StatusDelivered:
		gone := o.Status != orders.StatusConfirmed
		switch {
		case p.Authorized != o.Total:
			a.add("paid", orderAt(o.ID), "it is %s and comes to %s, but %s are authorised",
				o.Status, money(o.Total), money(p.Authorized))
		case p.Status == payments.StatusDeclined || p.Status == payments.StatusVoided,
			gone && p.Status == payments.StatusAuthorized:
			a.add("paid", orderAt(o.ID), "it is %s, but its payment is %s", o.Status, p.Status)
		case gone && p.Status != payments.StatusCaptureDeclined && p.Captured != p.Authorized:
			a.add("paid", orderAt(o.ID), "it is %s, but of %s only %s are captured",
				o.Status, money(p.Authorized), money(p.Captured))
		}
	case orders.StatusCancelled, orders.StatusRejected, orders.StatusExpired:
		if p.Status == payments.StatusAuthorized {
			a.add("no-charge", orderAt(o.ID), "it is %s, but %s are still authorised", o.Status, money(p.Authorized))
		}
		if net := p.Captured.Amount - p.Refunded.Amount; net != 0 {
			a.add("no-charge", orderAt(o.ID), "it is %s, but the customer was charged %d %s", o.Status, net, p.Captured.Currency)
		}
	}

	if p.Authorized.Amount < p.Captured.Amount || p.Captured.Amount < p.Refunded.Amount+p.Pending.Amount ||
		p.Refunded.Amount < 0 || p.Pending.Amount < 0 {
		a.add("payment-amounts", paymentAt(o.ID), "authorised %s, captured %s, refunded %s, pending %s",
			money(p.Authorized), money(p.Captured), money(p.Refunded), money(p.Pending))
	}
	var captures int
	var authorized, captured, refunded int64
	for _, m := range p.Movements {
		switch m.Type {
		case payments.Authorized{}.EventName():
			authorized += m.Amount.Amount
		case payments.Captured{}.EventName():
			captures++
			captured += m.Amount.Amount
		case payments.Refunded{}.EventName():
			refunded += m.Amount.Amount
		}
		sum := balances{}
		for _, posting := range m.Postings {
			sum[account{currency: posting.Amount.Currency}] += posting.Amount.Amount
		}
		for k, v := range sum {
			if v != 0 {
				a.add("posting-balance", paymentAt(o.ID), "the postings of a %s sum to %d %s", m.Type, v, k.currency)
			}
		}
	}
	if captures > 1 {
		a.add("payment-capture", paymentAt(o.ID), "it was captured %d times", captures)
	}
	if authorized != p.Authorized.Amount || captured != p.Captured.Amount || refunded != p.Refunded.Amount {
		a.add("payment-capture", paymentAt(o.ID),
			"it says authorised %d, captured %d, refunded %d, its movements sum to %d, %d, %d",
			p.Authorized.Amount, p.Captured.Amount, p.Refunded.Amount, authorized, captured, refunded)
	}
}

type account struct{ name, currency string }

type balances map[account]int64

func (w world) checkMoney(a *findings) {
	posted, earned := balances{}, balances{}
	for _, o := range w.orders {
		if o.Status == orders.StatusShipped || o.Status == orders.StatusDelivered {
			earned[account{"orders", o.Total.Currency}]++
			for _, l := range o.Lines {
				earned[account{"units", o.Total.Currency}] += l.Quantity
			}
		}
		if o.payment == nil {
			continue
		}
		for _, m := range o.payment.Movements {
			for _, p := range m.Postings {
				posted[account{p.Account, p.Amount.Currency}] += p.Amount.Amount
			}
		}
		earned[account{"revenue", o.payment.Captured.Currency}] += o.payment.Captured.Amount
		earned[account{"revenue", o.payment.Refunded.Currency}] -= o.payment.Refunded.Amount
	}
	ledger, sum, sales := balances{}, balances{}, balances{}
	for _, l := range w.ledger {
		ledger[account{l.Account, l.Balance.Currency}] += l.Balance.Amount
		sum[account{"", l.Balance.Currency}] += l.Balance.Amount
	}
	for _, s := range w.sales {
		sales[account{"revenue", s.Revenue.Currency}] += s.Revenue.Amount
		sales[account{"orders", s.Revenue.Currency}] += s.Orders
		sales[account{"units", s.Revenue.Currency}] += s.Units
	}
	differ(posted, ledger, func(k account, want, got int64) {
		a.add("ledger-balance", "/ledger", "%s holds %d %s, its postings sum to %d", k.name, got, k.currency, want)
	})
	differ(balances{}, sum, func(k account, _, got int64) {
		a.add("ledger-sum", "/ledger", "all accounts in %s sum to %d", k.currency, got)
	})
	differ(earned, sales, func(k account, want, got int64) {
		a.add("sales", "/sales", "the %s in %s are %d, those of the orders and payments %d", k.name, k.currency, got, want)
	})
}

// differ calls f for each account on which the two differ; a missing one is 0.
func differ(want, got balances, f func(k account, want, got int64)) {
	all := maps.Clone(want)
	maps.Copy(all, got)
	for k := range all {
		if want[k] != got[k] {
			f(k, want[k], got[k])
		}
	}
}

func money(m domain.Money) string { return fmt.Sprintf("%d %s", m.Amount, m.Currency) }

func part(p shop.Part) string {
	if p == (shop.Part{}) {
		return "none"
	}
	return fmt.Sprintf("%s at version %d", p.Status, p.Version)
}
