// Package domaintest answers the question "what does the shop's log look like when all goes well?", for tests and
// benchmarks of what reads it.
package domaintest

import (
	"github.com/google/uuid"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
)

// Deliver tells how an order goes, from its placing to its delivery: every event of every stream that takes part, in an
// order in which the shop could have come to them. Each item makes four of them, two of which are of stock, and the
// rest of the order 12.
func Deliver(order uuid.UUID, customer string, lines []orders.Line, tell func(stream string, events ...domain.Event)) {
	id := order.String()
	items := orders.Items(lines)
	total, err := orders.Total(lines)
	if err != nil {
		panic(err)
	}
	back := domain.Money{Amount: -total.Amount, Currency: total.Currency}
	tell(id, orders.Placed{Customer: customer, Lines: lines, Items: items, Total: total})
	for _, item := range items {
		tell(item.SKU, inventory.Reserved{Order: order, Quantity: item.Quantity})
		tell(id, orders.ItemReserved{SKU: item.SKU})
	}
	tell(id, orders.StockConfirmed{Total: total})
	tell(id, payments.AuthorizationRequested{Amount: total})
	tell(id, payments.Authorized{Amount: total, Reference: "ref", Postings: []payments.Posting{
		{Account: payments.AccountAuthorized, Amount: total}, {Account: payments.AccountAuthorizedFor, Amount: back}}})
	tell(id, orders.Confirmed{Items: items})
	tell(id, shipping.Created{Items: items}, shipping.Dispatched{Carrier: "Post", Tracking: "T1", Items: items})
	tell(id, orders.Shipped{Carrier: "Post", Tracking: "T1", Items: items, Total: total})
	for _, item := range items {
		tell(item.SKU, inventory.Shipped{Order: order, Quantity: item.Quantity})
	}
	tell(id, payments.CaptureRequested{Amount: total})
	tell(id, payments.Captured{Amount: total, Postings: []payments.Posting{
		{Account: payments.AccountReceivable, Amount: total}, {Account: payments.AccountRevenue, Amount: back}}})
	tell(id, shipping.Delivered{})
	tell(id, orders.Delivered{Items: items})
}
