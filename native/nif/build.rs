//! Link settings of the NIF.

fn main() {
    // Once loaded, the library stays mapped: threads of a stopping runtime may still run their last instructions when
    // the BEAM purges the module.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-link-arg-cdylib=-Wl,-z,nodelete");
    }
    if std::env::var("CARGO_CFG_TARGET_VENDOR").as_deref() == Ok("apple") {
        // enif_* are resolved when the BEAM loads the library.
        println!("cargo:rustc-link-arg-cdylib=-undefined");
        println!("cargo:rustc-link-arg-cdylib=dynamic_lookup");
    }
}
