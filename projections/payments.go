package projections

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/payments"
)

// Payments is every payment with its movements. Its state is the domain's own, so it cannot be told differently here.
var Payments = Define(Spec[paymentKey, paymentRow]{
	Name: "payments", Version: 1,
	Events: map[string]domain.Events{PaymentsTopic: payments.Events},
	Keys: func(e Event) []paymentKey {
		id, ok := orderOf(e)
		if !ok {
			return nil
		}
		return []paymentKey{{id}}
	},
	Apply: func(_ paymentKey, p paymentRow, e Event) paymentRow {
		p.State, p.Version = p.State.Evolve(e.Fact), e.Version
		p.OpenIntents = int64(len(p.State.Intents))
		p.Movements = append(slices.Clip(p.Movements), movement(e))
		return p
	},
})

type paymentKey struct {
	Order uuid.UUID `db:"order_id uuid"`
}

type paymentRow struct {
	State       payments.Payment `db:"state json"`
	OpenIntents int64            `db:"open_intents bigint"` // what the provider has not answered
	Movements   []Movement       `db:"movements json"`
	Version     int64            `db:"version bigint"`
}

// Payment is a payment as the API shows it.
type Payment struct {
	Order      uuid.UUID       `json:"order" format:"uuid"`
	Status     payments.Status `json:"status" enum:"authorizing,authorized,declined,capturing,captured,capture_declined,voiding,voided,refunded"`
	Authorized domain.Money    `json:"authorized" doc:"What was ever authorised; a void leaves it."`
	Captured   domain.Money    `json:"captured"`
	Refunded   domain.Money    `json:"refunded"`
	Pending    domain.Money    `json:"pending" doc:"Refunds that are asked for and not answered."`
	Version    int64           `json:"version"`
	Movements  []Movement      `json:"movements" doc:"Every event of the payment, oldest first."`
	Stale      bool            `json:"stale,omitempty" doc:"True while events of it could not be applied: this is how it is without them, and what came after them on their stream."`
}

// Movement is an event of a payment. Fields that its kind of event does not have are missing, but for the postings,
// which are empty when no money moved.
type Movement struct {
	ID        uuid.UUID          `json:"id" format:"uuid" doc:"Of the event."`
	Type      string             `json:"type" doc:"The event's stored name." example:"payment.captured.v1"`
	Time      time.Time          `json:"time"`
	Amount    *domain.Money      `json:"amount,omitempty"`
	Postings  []payments.Posting `json:"postings" doc:"A double entry: they sum to zero."`
	Refund    *uuid.UUID         `json:"refund,omitempty" format:"uuid" doc:"Which refund this is about."`
	Reference string             `json:"reference,omitempty" doc:"The provider's name for it."`
	Reason    string             `json:"reason,omitempty" doc:"Why the provider declined."`
}

func movement(e Event) Movement {
	m := Movement{ID: e.ID, Type: e.Name, Time: e.Time, Postings: postings(e)}
	switch f := e.Fact.(type) {
	case payments.AuthorizationRequested:
		m.Amount = &f.Amount
	case payments.Authorized:
		m.Amount, m.Reference = &f.Amount, f.Reference
	case payments.Declined:
		m.Reason = f.Reason
	case payments.CaptureRequested:
		m.Amount = &f.Amount
	case payments.Captured:
		m.Amount = &f.Amount
	case payments.CaptureDeclined:
		m.Reason = f.Reason
	case payments.Voided:
		m.Amount = &f.Amount
	case payments.RefundRequested:
		m.Amount, m.Refund = &f.Amount, &f.Refund
	case payments.Refunded:
		m.Amount, m.Refund = &f.Amount, &f.Refund
	case payments.RefundDeclined:
		m.Amount, m.Refund, m.Reason = &f.Amount, &f.Refund, f.Reason
	}
	return m
}

// postings is what the event books, never nil.
func postings(e Event) []payments.Posting {
	var ps []payments.Posting
	switch f := e.Fact.(type) {
	case payments.Authorized:
		ps = f.Postings
	case payments.Captured:
		ps = f.Postings
	case payments.Voided:
		ps = f.Postings
	case payments.Refunded:
		ps = f.Postings
	}
	if ps == nil {
		return []payments.Posting{}
	}
	return ps
}

type paymentOne struct {
	Consistency
	Order OrderID `path:"order"`
}

func scanPayment(row pgx.Row) (p Payment, err error) {
	var s payments.Payment
	err = row.Scan(&p.Order, &s, &p.Movements, &p.Version, &p.Stale)
	money := func(amount int64) domain.Money { return domain.Money{Amount: amount, Currency: s.Currency} }
	p.Status = s.Status
	p.Authorized, p.Captured, p.Refunded, p.Pending =
		money(s.Authorized), money(s.Captured), money(s.Refunded), money(s.Pending)
	return p, err
}

func registerPayments(api huma.API, db Reads) {
	read(api, db, Payments, huma.Operation{
		OperationID: "get-payment", Method: http.MethodGet, Path: "/payments/{order}",
		Summary: "The payment of an order", Tags: []string{"payments"},
	}, func(ctx context.Context, in *paymentOne) (*One[Payment], error) {
		p, err := scanPayment(db.QueryRow(ctx,
			"SELECT order_id, state, movements, version, stale FROM wharf_read.payments WHERE order_id = $1", in.Order.UUID()))
		return one(p, p.Version, err)
	})
}
