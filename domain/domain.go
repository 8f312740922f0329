// Package domain answers the question "what can happen in the shop, and what is then true?".
//
// It holds the words that all four services share: events, money, and an event as the public log tells it. Each
// service has a package of its own below this one (orders, inventory, payments, shipping) with its events and one
// pure aggregate; start with domain/orders/order.go. Nothing here does I/O, reads a clock or makes up an id: time
// and ids come in as values.
package domain

import (
	"errors"
	"fmt"
	"math/bits"
	"time"

	"github.com/google/uuid"
)

// Event is a past fact of one stream. Its Go name may change; its stored name never does.
type Event interface {
	// EventName is the stable stored name, such as "order.placed.v1".
	EventName() string
}

// Position is the place of an event in a public topic. Seq counts the accepted events of the partition from 1
// without a gap. The zero Position is no place at all.
type Position struct {
	Topic     string
	Partition int32
	Seq       int64
}

// String is the position as people and the HTTP API read it, such as "orders.events/3/17"; empty for the zero value.
func (p Position) String() string {
	if p.Topic == "" {
		return ""
	}
	return fmt.Sprintf("%s/%d/%d", p.Topic, p.Partition, p.Seq)
}

// Recorded is one accepted event as a public topic tells it.
type Recorded struct {
	ID      uuid.UUID // of the event
	Name    string    // stored name, e.g. "order.placed.v1"
	Service string    // who recorded it, e.g. "orders"
	Stream  string    // the entity's id, and the key of the record
	Version int64     // the stream's version after this event
	Time    time.Time // UTC
	Position
	Offset int64    // of the journal record that holds its commit
	Index  int      // within that commit, from 0
	Cause  Position // the event that it was made for; zero when an HTTP request or a deadline made it
	Trace  string   // W3C traceparent, or empty
	Data   []byte   // JSON
}

// Money is an amount in the currency's minor unit (pence, cents).
type Money struct {
	Amount   int64  `json:"amount"`
	Currency string `json:"currency"`
}

// ErrOverflow says that a sum of money does not fit 63 bits.
var ErrOverflow = errors.New("the amount is too large")

// Times is m times n (n >= 0), or ErrOverflow.
func (m Money) Times(n int64) (Money, error) {
	hi, lo := bits.Mul64(uint64(m.Amount), uint64(n))
	if m.Amount < 0 || n < 0 || hi != 0 || lo > 1<<63-1 {
		return Money{}, ErrOverflow
	}
	return Money{int64(lo), m.Currency}, nil
}

// Plus is the sum of two amounts that are not negative and of one currency, or ErrOverflow.
func (m Money) Plus(o Money) (Money, error) {
	sum := m.Amount + o.Amount
	if sum < m.Amount || sum < o.Amount {
		return Money{}, ErrOverflow
	}
	return Money{sum, m.Currency}, nil
}

// Quantity is a number of units of one SKU.
type Quantity struct {
	SKU      string `json:"sku"`
	Quantity int64  `json:"quantity"`
}
