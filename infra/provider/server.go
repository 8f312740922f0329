package provider

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"os"
	"sync"
	"time"

	"wharf/domain"
)

// Limits of the server.
const (
	maxBody  = 64 << 10
	maxText  = 255
	maxBusy  = 1024             // requests at once; further ones get 503
	maxQuiet = 60 * time.Second // how long a request that is never answered is held when the client stays
)

// Options of a Server.
type Options struct {
	Faults Faults
	File   string       // remembers deeds across restarts; empty: in memory only
	Log    *slog.Logger // default slog.Default()
}

// Server is the stand-in: an http.Handler for the API of the package comment, with /livez and /readyz. It is safe for
// concurrent use.
type Server struct {
	faults Faults
	log    *slog.Logger
	mux    *http.ServeMux
	busy   chan struct{}
	closed chan struct{}

	mu     sync.Mutex
	books  books
	tries  map[string]int // of keys with a chosen fault
	file   *os.File       // nil: in memory
	size   int64          // of the file's whole lines
	broken error          // the file can no longer be trusted to hold what is answered
}

// Open makes a Server that knows the deeds in Options.File, which it creates if need be. An answered deed is in the
// file before its answer goes out: it survives the death of the process, though not of the machine. Two servers must
// not share a file. Close it after use.
func Open(o Options) (*Server, error) {
	s := &Server{
		faults: o.Faults, log: cmp.Or(o.Log, slog.Default()), mux: http.NewServeMux(),
		busy: make(chan struct{}, maxBusy), closed: make(chan struct{}),
		books: newBooks(), tries: map[string]int{},
	}
	for kind, path := range paths {
		s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, kind) })
	}
	s.mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	s.mux.HandleFunc("GET /readyz", s.ready)
	s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		problem(w, http.StatusNotFound, "there is nothing at this path")
	})
	if o.File != "" {
		if err := s.open(o.File); err != nil {
			return nil, fmt.Errorf("open the provider's file: %w", err)
		}
	}
	return s, nil
}

func (s *Server) open(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	in := bufio.NewReader(f)
	for n := 1; ; n++ {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			// What is left is a line that was cut short when the process died, so its answer never went out.
			err = f.Truncate(s.size)
			s.file = f
			return err
		}
		var d deed
		if err == nil {
			err = json.Unmarshal(line, &d)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("%s, line %d: %w", name, n, err), f.Close())
		}
		s.books.add(d)
		s.size += int64(len(line))
	}
}

// Close lets go of the requests that are held without an answer, refuses new ones with 503, and closes the file. Call
// it once, when the HTTP server begins to shut down.
func (s *Server) Close() error {
	close(s.closed)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = errors.New("the provider is shutting down")
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// ServeHTTP serves the API.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

func (s *Server) ready(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	err := s.broken
	s.mu.Unlock()
	if err != nil {
		s.unavailable(w)
		return
	}
	fmt.Fprintln(w, "ready")
}

func (s *Server) unavailable(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "1")
	problem(w, http.StatusServiceUnavailable, "the provider cannot answer now")
}

// body is a request on the wire.
type body struct {
	Order         string       `json:"order"`
	Authorization string       `json:"authorization,omitempty"`
	Amount        domain.Money `json:"amount"`
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, kind string) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		s.unavailable(w)
		return
	}
	req, status, err := read(w, r, kind)
	if err != nil {
		if status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", http.MethodPost)
		}
		problem(w, status, err.Error())
		return
	}
	answer, f, err := s.do(req)
	switch {
	case errors.Is(err, errReused):
		problem(w, http.StatusUnprocessableEntity, err.Error())
		return
	case err != nil:
		s.log.Warn("payment provider did nothing", "kind", kind, "order", req.Order, "error", err)
		s.unavailable(w)
		return
	}
	switch {
	case f.silent > 0 || chance(s.faults.Timeout):
		s.wait(r, maxQuiet)
		s.unavailable(w) // to a client that is still there: it leaves the outcome open as well
		return
	case f.failing > 0 || chance(s.faults.Repeat):
		problem(w, http.StatusInternalServerError, "something went wrong")
		return
	case f.late > 0:
		s.wait(r, f.late)
	case chance(s.faults.Slow):
		s.wait(r, s.faults.Delay)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the client is gone: it will ask again
}

// wait returns after d, or when the client is gone or the server closes.
func (s *Server) wait(r *http.Request, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.Context().Done():
	case <-s.closed:
	}
}

var (
	errReused = errors.New("the Idempotency-Key was used for another request")
	errAbsent = errors.New("absent on request of the order")
)

// do answers the request once and for all, and says which fault this try was chosen for.
func (s *Server) do(r Request) (Answer, fault, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return Answer{}, fault{}, s.broken
	}
	d, done := s.books.deeds[r.Key]
	if done && d.Request != r {
		return Answer{}, fault{}, errReused
	}
	_, a := s.books.authorizationOf(r)
	f := chosen(r.Kind, a.asked)
	if f != (fault{}) {
		try := s.tries[r.Key]
		s.tries[r.Key]++
		f.silent, f.failing, f.absent = max(f.silent-try, 0), max(f.failing-try, 0), max(f.absent-try, 0)
		if try > 0 {
			f.late = 0
		}
	}
	if f.absent > 0 {
		return Answer{}, f, errAbsent
	}
	if !done {
		d = deed{r, s.books.decide(r, f.decline || r.Kind == Authorize && chance(s.faults.Decline))}
		if err := s.write(d); err != nil {
			return Answer{}, f, err
		}
		s.books.add(d)
	}
	return d.Answer, f, nil
}

func (s *Server) write(d deed) error {
	if s.file == nil {
		return nil
	}
	line, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("write down %s: %w", d.Key, err)
	}
	line = append(line, '\n')
	if _, err := s.file.Write(line); err != nil {
		err = fmt.Errorf("write down %s: %w", d.Key, err)
		if cut := s.file.Truncate(s.size); cut != nil { // half a line stays: the next one would be appended to it
			s.broken = errors.Join(err, cut)
		}
		return err
	}
	s.size += int64(len(line))
	return nil
}

// read checks a request. Its errors name fields, never values.
func read(w http.ResponseWriter, r *http.Request, kind string) (Request, int, error) {
	if r.Method != http.MethodPost {
		return Request{}, http.StatusMethodNotAllowed, errors.New("only POST is served at this path")
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return Request{}, http.StatusUnsupportedMediaType, errors.New("the body must be application/json")
	}
	in := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	in.DisallowUnknownFields()
	var b body
	err := in.Decode(&b)
	if err == nil {
		// Reading on to the end rules out a second value, and lets net/http notice when the client goes away.
		if _, err = in.Token(); errors.Is(err, io.EOF) {
			err = nil
		} else if err == nil {
			err = errors.New("more than one value")
		}
	}
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return Request{}, http.StatusRequestEntityTooLarge, fmt.Errorf("the body is larger than %d bytes", maxBody)
	}
	if err != nil {
		return Request{}, http.StatusBadRequest, errors.New("the body is not one JSON object of the documented fields")
	}
	req := Request{kind, r.Header.Get("Idempotency-Key"), b.Authorization, b.Order, b.Amount}
	switch {
	case !visible(req.Key):
		err = errors.New("the header Idempotency-Key must be 1 to 255 characters of visible ASCII")
	case kind == Authorize && b.Authorization != "":
		err = errors.New("authorization: an authorisation is named by its own Idempotency-Key")
	case kind != Authorize && !visible(b.Authorization):
		err = errors.New("authorization: must be the Idempotency-Key of the authorisation")
	case !visible(b.Order):
		err = errors.New("order: must be 1 to 255 characters of visible ASCII")
	case b.Amount.Amount < 1:
		err = errors.New("amount.amount: must be at least 1")
	case !currency(b.Amount.Currency):
		err = errors.New("amount.currency: must be three capital letters")
	}
	return req, http.StatusUnprocessableEntity, err
}

func visible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return s != "" && len(s) <= maxText
}

func currency(s string) bool {
	for i := range len(s) {
		if s[i] < 'A' || s[i] > 'Z' {
			return false
		}
	}
	return len(s) == 3
}

// problem answers with RFC 9457 problem details.
func problem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client is gone
		"type": "about:blank", "title": http.StatusText(status), "status": status, "detail": detail,
	})
}
