package domain

// Refusal is a business rule's "no": a decision that was made on the state and changed nothing. Two refusals with
// the same Code are the same rule speaking (errors.Is).
type Refusal struct {
	Code   string // stable, for programs: "order-already-shipped"
	Detail string // for people; may be empty
}

// Error is the detail, or the code where there is none.
func (r *Refusal) Error() string {
	if r.Detail != "" {
		return r.Detail
	}
	return r.Code
}

// Is says whether target is a refusal by the same rule.
func (r *Refusal) Is(target error) bool {
	t, ok := target.(*Refusal)
	return ok && t.Code == r.Code
}

// Refuse is the refusal of the rule `code`.
func Refuse(code, detail string) *Refusal { return &Refusal{code, detail} }

// ErrUnknown refuses a command to a stream that nothing has happened to.
var ErrUnknown = Refuse("unknown", "there is no such thing")
