package apache

import "syscall"

// attributes keep a broker out of reach of the terminal's Ctrl-C, and end it when this process ends, however it does.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
