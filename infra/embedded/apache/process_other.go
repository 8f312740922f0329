//go:build !linux

package apache

import "syscall"

// attributes keep a broker out of reach of the terminal's Ctrl-C.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
