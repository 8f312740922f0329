package load

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"wharf/domain"
	"wharf/domain/orders"
)

// A file of invoices is CSV with a header that names at least the columns below, plain or gzipped, with or without a
// byte order mark, lines ending in LF or CRLF.
//
// An invoice whose number is all digits is one order, in the order in which the numbers first appear (its rows need
// not stand together). A row with a Quantity above 0 and a UnitPrice that is a positive whole number of pence is a line
// of it; other rows are left out and counted. An invoice without such a row, and one whose number is not all digits, is
// skipped and counted. An empty CustomerID is the customer "guest", and "17850.0" is "17850".
//
// A row that cannot be read (broken CSV, a number that is none, a text that no SKU or customer can be) is reported and
// counts for nothing.
var columns = []string{"InvoiceNo", "StockCode", "Quantity", "UnitPrice", "CustomerID"}

const (
	currency    = "GBP"
	guest       = "guest"
	maxLines    = 2000      // of one order
	maxQuantity = 1_000_000 // of one line
	maxSKU      = 64        // characters
	maxText     = 200
)

// invoice is what the rows of one number come to.
type invoice struct {
	number   string
	customer string
	lines    []orders.Line
	leftOut  int
}

// invoices is a file's content, in file order.
type invoices []*invoice

// choose makes orders of the first n invoices that are good for one (of all if n is 0), and counts in the report what
// it passed over on the way.
func (all invoices) choose(n int, report *Report, say func(string, ...any)) []order {
	var chosen []order
	for _, in := range all {
		if n > 0 && len(chosen) == n {
			break
		}
		report.LinesLeftOut += in.leftOut
		_, err := orders.Total(in.lines)
		if len(in.lines) > maxLines {
			err = fmt.Errorf("it has %d lines, more than %d", len(in.lines), maxLines)
		}
		if err != nil {
			say("invoice %s skipped: %v", in.number, err)
		}
		if len(in.lines) == 0 || err != nil {
			report.InvoicesSkipped++
			continue
		}
		chosen = append(chosen, order{
			key: "invoice-" + in.number, name: "invoice " + in.number, customer: in.customer, lines: in.lines,
		})
	}
	return chosen
}

// Lines is the lines of each order that the file makes, in file order, for those who only want to know what real orders
// look like. Rows that cannot be read are passed over.
func Lines(file string) ([][]orders.Line, error) {
	all, err := readFile(file, func(int, error) {})
	if err != nil {
		return nil, err
	}
	var lines [][]orders.Line
	for _, o := range all.choose(0, &Report{}, func(string, ...any) {}) {
		lines = append(lines, o.lines)
	}
	return lines, nil
}

// readFile reads a file of invoices. It tells bad of each row that it cannot read, with its line number from 1.
func readFile(name string, bad func(line int, err error)) (invoices, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 64<<10)
	if magic, _ := in.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		return readInvoices(z, bad)
	}
	return readInvoices(in, bad)
}

func readInvoices(in io.Reader, bad func(line int, err error)) (invoices, error) {
	rows := newRows(in)
	header, _, err := rows.next()
	if err != nil {
		return nil, fmt.Errorf("the header: %w", err)
	}
	var at [5]int
	for i, name := range columns {
		if at[i] = slices.Index(header, name); at[i] < 0 {
			return nil, fmt.Errorf("the header has no column %s; it must name %s", name, strings.Join(columns, ", "))
		}
	}
	var all invoices
	byNumber := map[string]*invoice{}
	skus := map[string]string{} // one copy of each, and none of the rows they came in
	for {
		row, line, err := rows.next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if badRow := new(csv.ParseError); errors.As(err, &badRow) {
			bad(line, badRow.Err)
			continue
		}
		if err != nil {
			return nil, err
		}
		number := row[at[0]]
		in := byNumber[number]
		if in == nil {
			in = &invoice{number: strings.Clone(number), customer: guest}
		}
		if digits(number) {
			if err := in.add(row[at[1]], row[at[2]], row[at[3]], row[at[4]], skus); err != nil {
				bad(line, err)
				continue
			}
		} else if !text(number, maxText) {
			bad(line, errors.New("column InvoiceNo is empty, too long or not text"))
			continue
		}
		if byNumber[in.number] == nil {
			byNumber[in.number] = in
			all = append(all, in)
		}
	}
}

// add adds a row to the invoice, if only to count it as left out.
func (in *invoice) add(sku, quantity, price, customer string, skus map[string]string) error {
	n, whole, err := decimal(quantity, 0)
	if err != nil || !whole || n > maxQuantity {
		return fmt.Errorf("column Quantity is not a whole number of at most %d", maxQuantity)
	}
	pence, whole, err := decimal(price, 2)
	if err != nil {
		return errors.New("column UnitPrice is not a decimal number that fits")
	}
	if !text(sku, maxSKU) {
		return fmt.Errorf("column StockCode is not 1 to %d characters without control characters", maxSKU)
	}
	customer = strings.TrimSuffix(customer, ".0")
	if customer != "" && !text(customer, maxText) {
		return fmt.Errorf("column CustomerID is longer than %d characters or has control characters", maxText)
	}
	if in.customer == guest && customer != "" {
		in.customer = strings.Clone(customer)
	}
	if n <= 0 || pence <= 0 || !whole {
		in.leftOut++
		return nil
	}
	one, known := skus[sku]
	if !known {
		one = strings.Clone(sku)
		skus[one] = one
	}
	in.lines = append(in.lines, orders.Line{
		SKU: one, Quantity: n, UnitPrice: domain.Money{Amount: pence, Currency: currency},
	})
	return nil
}

func digits(s string) bool {
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != "" && len(s) <= maxText
}

func text(s string, most int) bool {
	return s != "" && utf8.ValidString(s) && utf8.RuneCountInString(s) <= most &&
		strings.IndexFunc(s, unicode.IsControl) < 0
}

// decimal reads a number like -12.50 in units of its places-th decimal. It is not whole when there are further decimals
// that are not zero; these are cut off.
func decimal(s string, places int) (n int64, whole bool, err error) {
	s = strings.TrimSpace(s)
	before, after, _ := strings.Cut(s, ".")
	after = strings.TrimRight(after, "0")
	whole = len(after) <= places
	if !whole {
		if !digits(after) {
			return 0, false, strconv.ErrSyntax
		}
		after = after[:places]
	}
	n, err = strconv.ParseInt(before+after+strings.Repeat("0", places-len(after)), 10, 64)
	return n, whole, err
}

// rows reads CSV row by row and goes on behind a row that is broken. An opening quote that is never closed takes
// everything behind it for one field; so the csv.Reader is fed line by line, and when a row of several lines turns out
// to be broken, only its first line is given up and the others are read anew.
type rows struct {
	in     *bufio.Reader
	csv    *csv.Reader
	fields int      // of each row, once the header is read
	row    [][]byte // the lines that the csv.Reader has taken for the row at hand
	size   int      // of row, in bytes
	rest   []byte   // of the last of them, not yet read
	again  [][]byte // lines to be read anew before further ones of the file
	line   int      // number of the last line taken
}

// maxRow is the most bytes of one row; a longer one is broken. A longer line is cut off, and so broken too.
const maxRow = 64 << 10

func newRows(in io.Reader) *rows {
	r := &rows{in: bufio.NewReaderSize(in, maxRow)}
	if bom, _ := r.in.Peek(3); bytes.Equal(bom, []byte("\ufeff")) {
		_, _ = r.in.Discard(3) // they are in the buffer
	}
	r.restart()
	return r
}

func (r *rows) restart() {
	r.csv = csv.NewReader(r)
	r.csv.FieldsPerRecord = r.fields
}

// next is the next row and the number of its first line. A *csv.ParseError concerns this row alone; io.EOF ends them.
func (r *rows) next() ([]string, int, error) {
	r.row, r.size = r.row[:0], 0
	row, err := r.csv.Read()
	if r.fields == 0 {
		r.fields = len(row)
	}
	blank := 0 // lines that csv passes over
	for blank < len(r.row) && len(bytes.TrimRight(r.row[blank], "\r\n")) == 0 {
		blank++
	}
	first := r.line - len(r.row) + blank + 1
	if bad := new(csv.ParseError); errors.As(err, &bad) {
		r.again = append(slices.Clone(r.row[blank+1:]), r.again...)
		r.line, r.rest = first, nil
		r.restart()
	}
	return row, first, err
}

// Read gives the csv.Reader the next line of the file, and nothing beyond it.
func (r *rows) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		if err := r.take(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// take makes the next line the rest to be read.
func (r *rows) take() error {
	if r.size > maxRow {
		return io.EOF // enough for one row: the csv.Reader misses the closing quote
	}
	var line []byte
	if len(r.again) > 0 {
		line, r.again = r.again[0], r.again[1:]
	} else {
		part, err := r.in.ReadSlice('\n')
		if len(part) == 0 {
			return err
		}
		line = bytes.Clone(part)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = r.in.ReadSlice('\n')
		}
	}
	r.line++
	r.row = append(r.row, line)
	r.size += len(line)
	r.rest = line
	return nil
}
