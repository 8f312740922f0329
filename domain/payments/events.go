package payments

import (
	"github.com/google/uuid"

	"wharf/domain"
)

// The accounts of the ledger. A positive balance is a debit.
const (
	AccountAuthorized    = "authorized"     // what customers have promised and we may still capture
	AccountAuthorizedFor = "authorized_for" // its counter-account
	AccountReceivable    = "receivable"     // what the provider owes us
	AccountRevenue       = "revenue"        // what we have earned, a credit
)

// Posting is one line of a double entry. The postings of one event sum to zero.
type Posting struct {
	Account string       `json:"account"`
	Amount  domain.Money `json:"amount"` // positive: debit, negative: credit
}

func transfer(from, to string, m domain.Money) []Posting {
	return []Posting{{to, m}, {from, domain.Money{Amount: -m.Amount, Currency: m.Currency}}}
}

// The events of a payment, whose id is the order's. Requested ones are intents: they are recorded before the provider
// is asked, and each stays open until the provider's answer is recorded.
type (
	// AuthorizationRequested opens the stream.
	AuthorizationRequested struct {
		Amount domain.Money `json:"amount"`
	}
	// Authorized says that the customer's money is set aside for us.
	Authorized struct {
		Amount    domain.Money `json:"amount"`
		Reference string       `json:"reference"` // the provider's
		Postings  []Posting    `json:"postings"`
	}
	// Declined says that it is not.
	Declined struct {
		Reason string `json:"reason"`
	}
	// CaptureRequested wants the authorised money.
	CaptureRequested struct {
		Amount domain.Money `json:"amount"`
	}
	// Captured says that it is ours.
	Captured struct {
		Amount   domain.Money `json:"amount"`
		Postings []Posting    `json:"postings"`
	}
	// CaptureDeclined says that it is not; people must see to it.
	CaptureDeclined struct {
		Reason string `json:"reason"`
	}
	// VoidRequested gives an authorisation back, whether it has been answered or not.
	VoidRequested struct{}
	// Voided says that nothing is set aside any more. Amount is what was, zero if it had not been answered.
	Voided struct {
		Amount   domain.Money `json:"amount"`
		Postings []Posting    `json:"postings"`
	}
	// RefundRequested pays money back.
	RefundRequested struct {
		Refund uuid.UUID    `json:"refund"`
		Amount domain.Money `json:"amount"`
	}
	// Refunded says that the customer has it.
	Refunded struct {
		Refund   uuid.UUID    `json:"refund"`
		Amount   domain.Money `json:"amount"`
		Postings []Posting    `json:"postings"`
	}
	// RefundDeclined says that the provider would not; the amount may be refunded anew.
	RefundDeclined struct {
		Refund uuid.UUID    `json:"refund"`
		Amount domain.Money `json:"amount"`
		Reason string       `json:"reason"`
	}
)

func (AuthorizationRequested) EventName() string { return "payment.authorization_requested.v1" }
func (Authorized) EventName() string             { return "payment.authorized.v1" }
func (Declined) EventName() string               { return "payment.declined.v1" }
func (CaptureRequested) EventName() string       { return "payment.capture_requested.v1" }
func (Captured) EventName() string               { return "payment.captured.v1" }
func (CaptureDeclined) EventName() string        { return "payment.capture_declined.v1" }
func (VoidRequested) EventName() string          { return "payment.void_requested.v1" }
func (Voided) EventName() string                 { return "payment.voided.v1" }
func (RefundRequested) EventName() string        { return "payment.refund_requested.v1" }
func (Refunded) EventName() string               { return "payment.refunded.v1" }
func (RefundDeclined) EventName() string         { return "payment.refund_declined.v1" }

// Events is the vocabulary of the payments service.
var Events = domain.EventsOf(AuthorizationRequested{}, Authorized{}, Declined{}, CaptureRequested{}, Captured{},
	CaptureDeclined{}, VoidRequested{}, Voided{}, RefundRequested{}, Refunded{}, RefundDeclined{})
