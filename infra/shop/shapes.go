package shop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/domain/payments"
)

// NewOrder is what is asked for with POST /orders.
type NewOrder struct {
	Customer string        `json:"customer"`
	Lines    []orders.Line `json:"lines"`
}

// Part is what an order says of its payment or shipment. Its status is empty while there is none.
type Part struct {
	Status  string `json:"status"`
	Version int64  `json:"version"`
}

// Order is an order. Lines are missing in lists.
type Order struct {
	ID        string        `json:"id"`
	Customer  string        `json:"customer"`
	Status    orders.Status `json:"status"`
	Reason    string        `json:"reason"`
	Lines     []orders.Line `json:"lines"`
	Total     domain.Money  `json:"total"`
	Payment   Part          `json:"payment"`
	Shipment  Part          `json:"shipment"`
	Version   int64         `json:"version"`
	PlacedAt  time.Time     `json:"placed_at"`
	UpdatedAt time.Time     `json:"updated_at"`
}

// HistoryEntry is one event of an order, in whichever service it happened.
type HistoryEntry struct {
	ID       string          `json:"id"`
	Type     string          `json:"type"` // the event's stored name
	Service  string          `json:"service"`
	Time     time.Time       `json:"time"`
	Version  int64           `json:"version"`
	Position string          `json:"position"`
	Cause    string          `json:"cause"` // a position, empty for what a request or a deadline made
	Data     json.RawMessage `json:"data"`
}

// Stock is the stock of one SKU, in units.
type Stock struct {
	SKU       string `json:"sku"`
	Received  int64  `json:"received"`
	Adjusted  int64  `json:"adjusted"` // signed
	Available int64  `json:"available"`
	Reserved  int64  `json:"reserved"`
	Shipped   int64  `json:"shipped"`
	Version   int64  `json:"version"`
}

// Payment is the payment of an order.
type Payment struct {
	Order      string          `json:"order"`
	Status     payments.Status `json:"status"`
	Authorized domain.Money    `json:"authorized"`
	Captured   domain.Money    `json:"captured"`
	Refunded   domain.Money    `json:"refunded"`
	Pending    domain.Money    `json:"pending"` // refunds that are asked for and not answered
	Version    int64           `json:"version"`
	Movements  []Movement      `json:"movements"`
}

// Movement is one event of a payment.
type Movement struct {
	ID       string             `json:"id"`
	Type     string             `json:"type"` // the event's stored name
	Time     time.Time          `json:"time"`
	Amount   domain.Money       `json:"amount"`
	Postings []payments.Posting `json:"postings"`
}

// Shipment is the shipment of an order.
type Shipment struct {
	Order    string `json:"order"`
	Status   string `json:"status"`
	Carrier  string `json:"carrier"`
	Tracking string `json:"tracking"`
	Version  int64  `json:"version"`
}

// LedgerLine is the balance of one account in one currency.
type LedgerLine struct {
	Account string       `json:"account"`
	Balance domain.Money `json:"balance"`
}

// SalesLine is the sales of one UTC day in one currency.
type SalesLine struct {
	Date    string       `json:"date"`    // YYYY-MM-DD
	Revenue domain.Money `json:"revenue"` // captured less refunded
	Orders  int64        `json:"orders"`  // that left
	Units   int64        `json:"units"`
}

// Projections says how far the read models and the policies are.
type Projections struct {
	Items []struct {
		Name     string          `json:"name"`
		Build    json.RawMessage `json:"build"`
		Version  json.RawMessage `json:"version"`
		State    string          `json:"state"` // "building", or how the build that queries read is: "live" or "halted"
		Position json.RawMessage `json:"position"`
		Lag      int64           `json:"lag"` // events
	} `json:"items"`
	Policies []struct {
		Service string `json:"service"`
		Lag     int64  `json:"lag"` // events
	} `json:"policies"`
	OpenIntents int64 `json:"open_intents"`
}

const (
	stateLive     = "live"
	stateBuilding = "building"
)

// Backlog is how much is still to do: the lag of all policies and of the read models that queries read, and the open
// intents.
func (p Projections) Backlog() int64 {
	n := p.OpenIntents
	for _, m := range p.Items {
		if m.State != stateBuilding {
			n += m.Lag
		}
	}
	for _, s := range p.Policies {
		n += s.Lag
	}
	return n
}

// Busy names something that is not at rest; it is empty when there is no such thing.
func (p Projections) Busy() string {
	read := 0
	for _, m := range p.Items {
		if m.State == stateBuilding {
			continue
		}
		read++
		if m.State != stateLive {
			return fmt.Sprintf("the read model %s is %s", m.Name, m.State)
		}
		if m.Lag != 0 {
			return fmt.Sprintf("the read model %s is %d events behind", m.Name, m.Lag)
		}
	}
	for _, s := range p.Policies {
		if s.Lag != 0 {
			return fmt.Sprintf("the policies of %s are %d events behind", s.Service, s.Lag)
		}
	}
	switch {
	case p.OpenIntents != 0:
		return fmt.Sprintf("%d requests to the payment provider are unanswered", p.OpenIntents)
	case read == 0:
		return "no read model is live"
	}
	return ""
}

// SamePositions says that no read model that queries read stands elsewhere than in o.
func (p Projections) SamePositions(o Projections) bool {
	before := map[string][]byte{}
	for _, m := range o.Items {
		if m.State != stateBuilding {
			before[m.Name] = m.Position
		}
	}
	for _, m := range p.Items {
		if m.State != stateBuilding && !bytes.Equal(before[m.Name], m.Position) {
			return false
		}
	}
	return true
}
